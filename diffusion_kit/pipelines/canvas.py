"""The size of a result and the pictures it is painted over, as tensors of one size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.control import Control
from diffusion_kit.adapters.pictures import eight_bit

Box = tuple[int, int, int, int]


class Canvas(NamedTuple):
    """Size of the result and what it is painted over.

    Attributes:
        picture: (N, 3, H, W) in [-1, 1], or latents (N, 4, h, w). mask: (N, 1, H, W) of 0 and 1.
        crop: box of the picture that `padding_mask_crop` works on.
    """

    height: int
    width: int
    picture: Tensor | None = None
    mask: Tensor | None = None
    crop: Box | None = None

    def latent_size(self, factor: int) -> tuple[int, int]:
        return self.height // factor, self.width // factor

    def into_crop(self, control: Control, whole: Image.Image) -> Control:
        """The control with its pictures and masks cut to the region that is worked on, as the picture `whole` is."""

        def cut(pictures: Any) -> Any:
            if isinstance(pictures, (list, tuple)):
                return [cut(picture) for picture in pictures]
            if not isinstance(pictures, Image.Image):
                raise ValueError("padding_mask_crop needs PIL pictures, in controls too")
            region = eight_bit(pictures).resize(whole.size, Image.Resampling.LANCZOS).crop(self.crop)
            return VaeImageProcessor()._resize_and_fill(region, self.width, self.height)

        return replace(control, image=cut(control.image), mask=None if control.mask is None else cut(control.mask))


def make_canvas(
    processor: VaeImageProcessor,
    image: Any,
    mask: Any,
    height: int | None,
    width: int | None,
    padding: int | None,
    *,
    native: int,
    latent_channels: int,
) -> Canvas:
    """The call's pictures, prepared by diffusers' image processor.

    Args:
        image, mask: PIL pictures, arrays or tensors, or lists of them; None without.
        height, width: asked for; by default the picture's, rounded down to what the VAE divides.
        padding: margin around the mask of the region to work on, of size height x width, or None for the whole picture.
        native: side of the pictures that the model was made for.

    Raises:
        ValueError: a size that the VAE does not divide, or `padding` without PIL pictures.
    """
    factor = processor.config.vae_scale_factor
    if height is not None or width is not None:
        _check_size(height or native, width or native, factor)
    if image is None:
        return Canvas(height or native, width or native)
    options: dict[str, Any] = {}
    if padding is not None and mask is not None:
        if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
            raise ValueError("padding_mask_crop needs one PIL image and one PIL mask")
        height, width = height or native, width or native
        crop = processor.get_crop_region(mask, width, height, pad=padding)
        options = {"crops_coords": crop, "resize_mode": "fill"}
    picture = processor.preprocess(_plain(image), height=height, width=width, **options)
    scale = factor if picture.shape[1] == latent_channels else 1
    height, width = picture.shape[-2] * scale, picture.shape[-1] * scale
    if mask is None:
        return Canvas(height, width, picture)
    masks = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    values = masks.preprocess(_plain(mask), height=height, width=width, **options)
    return Canvas(height, width, picture, values, options.get("crops_coords"))


def _plain(picture: Any) -> Any:
    """RGB pictures and float arrays: what diffusers' image processor expects."""
    if isinstance(picture, (list, tuple)):
        return [_plain(one) for one in picture]
    if isinstance(picture, Image.Image):
        return eight_bit(picture)
    bytes_of = {np.ndarray: np.uint8, Tensor: torch.uint8}.get(type(picture))
    return picture / np.float32(255) if bytes_of is not None and picture.dtype == bytes_of else picture


def _check_size(height: int, width: int, factor: int) -> None:
    if height % factor or width % factor or height < factor or width < factor:
        near = [max(factor, round(side / factor) * factor) for side in (width, height)]
        raise ValueError(
            f"width and height must be multiples of {factor}, not {width} x {height}; nearest {near[0]} x {near[1]}"
        )
