"""Detectors: from a photo to a control image.

A detector is one module here with a function `detect(image, **options) -> PIL.Image`, given an RGB picture. It may say

* `RESOLUTION`: length of the shorter side at which it looks, where that is not the photo's own;
* `MULTIPLE`: what its network needs both sides to be multiples of;
* `RESAMPLE`: how its result is brought to the size asked for (Lanczos if it does not say);
* `LINES`: its result is white lines on black, which keep a pixel's width where the result is much smaller;
* `missing(model=None) -> str | None`: what it needs and does not find, in one line; None where it can run now.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from diffusion_kit.adapters.pictures import MEGAPIXELS, eight_bit, load_image, resize

LONGEST = 4  # longer side over shorter side, at most, of what a network looks at


def detect(
    name: str,
    image: Any,
    *,
    detect_resolution: int | None = None,
    image_resolution: int | None = None,
    invert: bool = False,
    **options: Any,
) -> Image.Image:
    """The control image of kind `name` ("canny") of a photo (PIL picture, or path of an image file), in its shape.

    Args:
        detect_resolution: length in pixels of the shorter side at which the detector looks; by default the photo's own, or
            what the detector's network was made for.
        image_resolution: length in pixels of the shorter side of the result; by default the photo's.
        invert: black for white: for adapters that expect dark lines on white.
        options: the detector's own.

    Returns:
        RGB, 8 bits; or 16-bit greyscale (mode "I;16") of detectors of depth.

    Raises:
        ValueError: no such detector, or a value out of range. TypeError: no such option.
        FileNotFoundError: a network's weights are missing; says which file is wanted and where it was looked for.
    """
    module = detector(name)
    check_options(name, module, options)
    for what, side in (("detect_resolution", detect_resolution), ("image_resolution", image_resolution)):
        if side is not None and side < 1:
            raise ValueError(f"{what} is {side}; it must be 1 or more")
    photo = load_image(image)
    size = photo.size if image_resolution is None else _scaled(photo.size, image_resolution / min(photo.size))
    if size[0] * size[1] > MEGAPIXELS * 1e6:
        raise ValueError(
            f"the result would have {size[0]} x {size[1]} pixels; at most {MEGAPIXELS} megapixels are made"
        )
    seen = _seen_size(
        photo.size, detect_resolution or getattr(module, "RESOLUTION", None), getattr(module, "MULTIPLE", 1)
    )
    result = module.detect(resize(eight_bit(photo), seen), **options)
    if getattr(module, "LINES", False):
        result = _thickened(result, min(seen[0] / size[0], seen[1] / size[1]))
    result = resize(result, size, getattr(module, "RESAMPLE", Image.Resampling.LANCZOS))
    return inverted(result) if invert else result


def detector(name: str) -> ModuleType:
    """The module of a detector.

    Raises:
        ValueError: no such detector; names those there are.
    """
    if name not in detectors():
        near = difflib.get_close_matches(name, detectors(), 1, 0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no detector {name!r}; {hint}there are {', '.join(detectors())}")
    return importlib.import_module(f"{__name__}.{name}")


def detectors() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def missing(name: str, model: Any = None) -> str | None:
    """What a detector needs and does not find, in one line; None where it can run now."""
    check = getattr(detector(name), "missing", None)
    return None if check is None else check(model)


def options_of(module: ModuleType) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(module.detect).parameters.items() if p.kind is p.KEYWORD_ONLY}


def check_options(name: str, module: ModuleType, options: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: an option that the detector does not take. ValueError: a fraction where a whole number belongs.
    """
    own = options_of(module)
    known = [*own, "detect_resolution", "image_resolution", "invert"]
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
            raise TypeError(f"detector {name!r} takes no option {option!r}{hint}")
        if option in own and own[option].annotation == "int" and isinstance(value, float):
            raise ValueError(f"{option} is {value}; it must be a whole number")


def inverted(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return Image.fromarray(65535 - np.asarray(picture))
    return ImageOps.invert(picture)


def _thickened(lines: Image.Image, shrink: float) -> Image.Image:
    """White lines so wide that, made so many times smaller, they are about a pixel wide and not grey."""
    import cv2

    width = max(1, int(shrink) // 2 * 2 - 1)
    return Image.fromarray(cv2.dilate(np.asarray(lines), np.ones((width, width), np.uint8)))


def _seen_size(size: tuple[int, int], side: int | None, multiple: int) -> tuple[int, int]:
    """The size at which a detector looks: shorter side `side`, but the longer one at most LONGEST times that."""
    scale = 1.0 if side is None else min(side / min(size), LONGEST * side / max(size))
    width, height = (max(multiple, round(length / multiple) * multiple) for length in _scaled(size, scale))
    return width, height


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = (max(1, round(length * scale)) for length in size)
    return width, height
