"""The size of a result and the pictures it is painted over, as tensors of one size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.control import Control
from diffusion_kit.adapters.pictures import as_list, eight_bit, fitted

Box = tuple[int, int, int, int]


class Canvas(NamedTuple):
    """Size of the result and what it is painted over.

    Attributes:
        picture: (N, 3, H, W) in [-1, 1], or latents (N, 4, h, w). mask: (N, 1, H, W) of 0 and 1.
        crop: box of the picture that `padding_mask_crop` works on.
        fit: how pictures of another shape are brought to it.
    """

    height: int
    width: int
    picture: Any = None
    mask: Any = None
    crop: Box | None = None
    fit: str = "stretch"

    def latent_size(self, factor: int) -> tuple[int, int]:
        return self.height // factor, self.width // factor

    def place(self, control: Control, whole: Image.Image) -> Control:
        """The control with its pictures and masks brought to the canvas: cut to the region that is worked on, as the
        picture `whole` is, or fitted to the result's shape.

        Raises:
            ValueError: that is wanted of something other than PIL pictures.
        """
        if (self.crop is None and self.fit == "stretch") or not isinstance(control, Control):
            return control

        def placed(pictures: Any) -> Any:
            if isinstance(pictures, (list, tuple)):
                return [placed(picture) for picture in pictures]
            if isinstance(pictures, Mapping):
                return {name: placed(picture) for name, picture in pictures.items()}
            if self.crop is None:
                return fitted(pictures, self.width, self.height, self.fit)
            if not isinstance(pictures, Image.Image):
                raise ValueError("padding_mask_crop needs PIL pictures, in controls too")
            region = eight_bit(pictures).resize(whole.size, Image.Resampling.LANCZOS).crop(self.crop)
            return VaeImageProcessor()._resize_and_fill(region, self.width, self.height)

        mask = None if control.mask is None else placed(control.mask)
        whole_image = getattr(control.model, "is_reference", False)
        return replace(control, image=control.image if whole_image else placed(control.image), mask=mask)


def make_canvas(
    processor: VaeImageProcessor,
    image: Any,
    mask: Any,
    height: int | None,
    width: int | None,
    padding: int | None,
    *,
    native: tuple[int, int],
    latent_channels: int,
    multiple: int,
    fit: str,
    rounding: str = "nearest",
) -> Canvas:
    """The call's pictures, prepared by diffusers' image processor.

    Args:
        image, mask: PIL pictures, arrays or tensors, or lists of them; None without.
        height, width: asked for; by default the picture's. Rounded, with a warning, to what the networks divide.
        padding: margin around the mask of the region to work on, of size height x width, or None for the whole picture.
        native: height and width of the pictures that the model was made for.
        multiple: what every network of the run divides.
        rounding: of a size that was asked for: see `rounded`.
        fit: how PIL pictures of another shape are brought to height x width: see `adapters.pictures.fit_image`.

    Raises:
        ValueError: a picture that is too small, or `padding` or `fit` without PIL pictures.
    """
    cropped = padding is not None and mask is not None
    if height is not None or width is not None or image is None or cropped:
        height, width = rounded("the size asked for", height or native[0], width or native[1], multiple, rounding)
    if image is None:
        return Canvas(height or native[0], width or native[1], fit=fit)
    options: dict[str, Any] = {}
    if cropped:
        if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
            raise ValueError("padding_mask_crop needs one PIL image and one PIL mask")
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
        crop = processor.get_crop_region(mask, width, height, pad=padding)
        options = {"crops_coords": crop, "resize_mode": "fill"}
    first = as_list(image)[0]
    if height is None and isinstance(first, Image.Image):
        height, width = rounded("the picture", first.height, first.width, multiple, "down")

    def own_shape(pictures: Any) -> Any:
        return pictures if cropped or fit == "stretch" else fitted(pictures, width, height, fit)  # type: ignore[arg-type]

    picture = processor.preprocess(_plain(own_shape(image)), height=height, width=width, **options)
    scale = processor.config.vae_scale_factor if picture.shape[1] == latent_channels else 1
    height, width = picture.shape[-2] * scale, picture.shape[-1] * scale
    if mask is None:
        return Canvas(height, width, picture, fit=fit)
    masks = VaeImageProcessor(
        vae_scale_factor=processor.config.vae_scale_factor,
        do_normalize=False,
        do_binarize=True,
        do_convert_grayscale=True,
    )
    values = masks.preprocess(_plain(own_shape(mask)), height=height, width=width, **options)
    return Canvas(height, width, picture, values, options.get("crops_coords"), fit)


def _plain(picture: Any) -> Any:
    """RGB pictures and float arrays: what diffusers' image processor expects."""
    if isinstance(picture, (list, tuple)):
        return [_plain(one) for one in picture]
    if isinstance(picture, Image.Image):
        return eight_bit(picture)
    bytes_of = {np.ndarray: np.uint8, Tensor: torch.uint8}.get(type(picture))
    return picture / np.float32(255) if bytes_of is not None and picture.dtype == bytes_of else picture


ROUNDINGS: dict[str, Callable[[float], int]] = {"nearest": round, "down": math.floor, "up": math.ceil}


def rounded(what: str, height: int, width: int, multiple: int, rounding: str = "nearest") -> tuple[int, int]:
    """Height and width as multiples: the "nearest" ones, those "down" or "up", with a warning where they are others."""
    if height < 1 or width < 1:
        raise ValueError(f"{what} is {width} x {height} pixels; both sides must be 1 or more")
    sides = [ROUNDINGS[rounding](side / multiple) * multiple for side in (height, width)]
    if rounding == "down" and not all(sides):
        raise ValueError(f"{what} is {width} x {height} pixels; give height= and width=, multiples of {multiple}")
    high, wide = (max(multiple, side) for side in sides)
    if (high, wide) != (height, width):
        warnings.warn(
            f"{what} is {width} x {height}, sides must be multiples of {multiple}: the result is {wide} x {high}",
            stacklevel=2,
        )
    return high, wide
