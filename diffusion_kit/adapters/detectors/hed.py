"""Soft edges after Xie and Tu (2015, arXiv:1504.06375), by controlnet_aux."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import absence, annotator, fill, find, look

RESOLUTION, MULTIPLE = 512, 64
WEIGHTS = "ControlNetHED.pth"


def detect(image: Image.Image, *, model: Any = None) -> Image.Image:
    """White soft edges on black, RGB, of the picture's size.

    Args:
        model: a folder with ControlNetHED.safetensors, that file, or a hub id.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    return look(image, _build, find("hed", WEIGHTS, model))


def missing(model: Any = None) -> str | None:
    return absence("hed", WEIGHTS, model)


def _build(file: Path) -> Any:
    aux = annotator("hed")
    return aux.HEDdetector(fill(aux.ControlNetHED_Apache2, file))
