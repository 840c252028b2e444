"""Pictures on the way in: files that are safe to open, and tensors in the shape that a network takes."""

from __future__ import annotations

import io
import struct
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffusion_kit.sampling.doors import spread

FORMATS = ("PNG", "JPEG", "WEBP")
MEGAPIXELS = 64
LARGEST = 100_000_000  # bytes that are fetched of a URL
FITS = ("cover", "contain", "stretch")  # of a result
INSIDE = "inside"  # of what a detector sees

Picture = Image.Image | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    background: str = "white",
    megapixels: float = MEGAPIXELS,
    name: str | None = None,
) -> Image.Image:
    """A picture from a PNG, JPEG or WEBP file: EXIF rotation applied, colour profile converted to sRGB, transparency laid
    on `background`. 16-bit greyscale (depth maps) stays 16-bit, mode "I;16"; everything else is RGB. Of an animation it is
    the first frame.

    Args:
        source: path of a file, its bytes, or a URL (http or https), which is fetched.
        name: of the picture in errors; by default the path.

    Raises:
        ValueError: no such file, another format, broken, or larger than `megapixels`.
    """
    if isinstance(source, Image.Image):
        return _upright(source, background)
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _fetched(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"no image file {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        width, height = picture.size
        if width * height > megapixels * 1e6:
            raise ValueError(f"{name} has {width} x {height} pixels; at most {megapixels} megapixels are read")
        picture.load()
        return _upright(picture, background)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a PNG, JPEG or WEBP image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels; at most {megapixels} megapixels are read") from None
    except (OSError, SyntaxError, TypeError, LookupError, struct.error) as error:  # PIL's, of damaged headers and EXIF
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def _fetched(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "diffusion_kit"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            data = bytes(answer.read(LARGEST + 1))
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from None
    if len(data) > LARGEST:
        raise ValueError(f"{url} is larger than {LARGEST // 10**6} MB")
    return data


def _upright(picture: Image.Image, background: str) -> Image.Image:
    profile = picture.info.get("icc_profile")
    picture = sixteen_bit(ImageOps.exif_transpose(picture))
    if picture.mode.startswith("I;16"):
        return picture
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        under = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(under, picture).convert("RGB")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
            picture = converted or picture
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: the colours are taken as sRGB
    return picture.convert("RGB")


def sixteen_bit(picture: Image.Image) -> Image.Image:
    """Grey with 32 bits, which PIL cuts at 255 when it converts it, with the 16 that its numbers have."""
    if picture.mode != "I":
        return picture
    return Image.fromarray(np.asarray(picture).clip(0, 65535).astype(np.uint16))


def eight_bit(picture: Image.Image) -> Image.Image:
    """RGB with eight bits a channel; sixteen bits of grey are divided by 257, where PIL would cut them at 255."""
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    return picture.convert("RGB")


def resize(
    picture: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The picture, or the part of it in `box`, at `size` (width, height), stretched; sixteen bits of grey stay sixteen."""
    if picture.size == size and (box is None or box == (0, 0, *size)):
        return picture
    if not picture.mode.startswith("I;16"):
        return picture.resize(size, resample, box)
    values = np.asarray(picture.convert("F").resize(size, resample, box))
    return Image.fromarray(values.round().clip(0, 65535).astype(np.uint16))


def fit_image(picture: Image.Image, width: int, height: int, fit: str = "cover") -> Image.Image:
    """The picture at width x height.

    Args:
        fit: "cover" cuts evenly what is over after scaling it to cover the area; "contain" scales it to be inside, with
            black bars, and "inside" without them, so that one side may be shorter; "stretch" scales each side by itself.

    Raises:
        ValueError: another `fit`.
    """
    if fit not in (*FITS, INSIDE):
        raise ValueError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}")
    picture = sixteen_bit(picture)
    if picture.mode not in ("RGB", "L", "I;16"):  # others have no black that is 0
        picture = picture.convert("RGB")
    scales = width / picture.width, height / picture.height
    if fit == "cover":
        w, h = min(width / max(scales), picture.width), min(height / max(scales), picture.height)  # what is kept
        left, top = (picture.width - w) / 2, (picture.height - h) / 2
        return resize(picture, (width, height), box=(left, top, left + w, top + h))
    if fit in ("contain", INSIDE):
        w, h = (max(1, round(side * min(scales))) for side in picture.size)
        if fit == INSIDE:
            return resize(picture, (w, h))
        canvas = Image.new(picture.mode, (width, height))
        canvas.paste(resize(picture, (w, h)), ((width - w) // 2, (height - h) // 2))
        return canvas
    return resize(picture, (width, height))


def fitted(pictures: Any, width: int, height: int, fit: str) -> Any:
    """Every PIL picture of a list at width x height.

    Raises:
        ValueError: something else than a PIL picture.
    """
    if isinstance(pictures, (list, tuple)):
        return [fitted(picture, width, height, fit) for picture in pictures]
    if not isinstance(pictures, Image.Image):
        raise ValueError(f"fit={fit!r} needs PIL pictures, not {type(pictures).__name__}")
    return fit_image(pictures, width, height, fit)


def as_list(pictures: Any) -> list[Any]:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def picture_tensor(pictures: Pictures, height: int, width: int, *, channels: int | None = 3) -> Tensor:
    """(N, C, height, width) float32 in [0, 1] from PIL pictures, arrays (H, W, C) or tensors ((N,) C, H, W).

    PIL pictures are resized with Lanczos; arrays and tensors, already in [0, 1] if they are floats, to the nearest pixel.
    One channel is the luma. `channels=None` keeps those of a tensor.

    Raises:
        ValueError: not a picture, or a number of channels that cannot become the one asked for.
    """
    stack = torch.cat([_tensor(picture, height, width, channels) for picture in as_list(pictures)])
    if channels is None or stack.shape[1] == channels:
        return stack
    if stack.shape[1] == 1:
        return stack.expand(-1, channels, -1, -1)
    if stack.shape[1] == 3 and channels == 1:
        weights = stack.new_tensor([0.299, 0.587, 0.114])  # ITU-R BT.601 luma, as PIL's "L"
        return (stack * weights[None, :, None, None]).sum(1, keepdim=True)
    raise ValueError(f"a picture of {stack.shape[1]} channels where {channels} are needed")


def _tensor(picture: Picture, height: int, width: int, channels: int | None) -> Tensor:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) / 65535).astype(np.float32))  # mode "F"
        elif channels == 1:
            picture = picture.convert("L")
        elif picture.mode != "RGB":
            picture = picture.convert("RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        values = np.asarray(picture)
        values = values if values.ndim == 3 else values[..., None]
        values = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
        return torch.from_numpy(values).permute(2, 0, 1)[None]
    if isinstance(picture, np.ndarray):
        values = picture[..., None] if picture.ndim == 2 else picture
        values = values[None] if values.ndim == 3 else values
        tensor = torch.from_numpy(np.ascontiguousarray(values)).permute(0, 3, 1, 2)
        tensor = tensor.float() / 255 if values.dtype == np.uint8 else tensor.float()
        _check_range(torch.from_numpy(np.ascontiguousarray(picture)))
    elif isinstance(picture, Tensor):
        tensor = picture if picture.ndim == 4 else picture[None] if picture.ndim == 3 else picture[None, None]
        tensor = tensor.float() / (255 if picture.dtype == torch.uint8 else 1)
        _check_range(picture)
    else:
        raise ValueError(f"{type(picture).__name__} is not a picture: give a PIL image, an array or a tensor")
    return tensor if tensor.shape[-2:] == (height, width) else torch.nn.functional.interpolate(tensor, (height, width))


def _check_range(values: Tensor) -> None:
    """
    Raises:
        ValueError: numbers that are neither bytes, truth values, nor fractions in [0, 1].
    """
    if values.dtype in (torch.uint8, torch.bool):
        return
    low, high = values.min().item(), values.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"a picture of {kind} values from {low:.4g} to {high:.4g}: give bytes, or values in [0, 1]")


def mask_tensor(mask: Pictures, height: int, width: int, prompts: int, per_prompt: int, what: str) -> Tensor:
    """Greyscale masks, one for each picture or one for all: (B or 1, 1, height, width) in [0, 1]."""
    values = picture_tensor(mask, height, width, channels=1).clamp(0, 1)
    return values if len(values) == 1 else spread(values, prompts, per_prompt, what)
