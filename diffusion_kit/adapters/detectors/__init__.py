"""Detectors: from a photo to a control image. A detector is one module here with a function `detect(image, **options)`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from PIL import Image

from diffusion_kit.adapters.pictures import load_image


def detect(name: str, image: Any, **options: Any) -> Image.Image:
    """The control image of kind `name` ("canny") of a photo (PIL picture, or path of an image file).

    Raises:
        ValueError: no such detector; names those there are.
    """
    return detector(name)(load_image(image), **options)


def detector(name: str) -> Callable[..., Image.Image]:
    if name not in detectors():
        raise ValueError(f"no detector {name!r}; there are {', '.join(detectors())}")
    return importlib.import_module(f"{__name__}.{name}").detect


def detectors() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]
