"""Straight lines after Gu et al. (2021, arXiv:2106.00186), by controlnet_aux."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import absence, annotator, fill, find, look

RESOLUTION, MULTIPLE = 512, 64
LINES = True
WEIGHTS = "mlsd_large_512_fp32.pth"


def detect(image: Image.Image, *, model: Any = None, thr_v: float = 0.1, thr_d: float = 0.1) -> Image.Image:
    """White straight lines of one pixel on black, RGB, of the picture's size.

    Args:
        model: a folder with mlsd_large_512_fp32.safetensors, that file, or a hub id.
        thr_v: score in [0, 1] that a line must exceed.
        thr_d: length that a line must exceed, in units of two pixels.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    return look(image, _build, find("mlsd", WEIGHTS, model), thr_v=thr_v, thr_d=thr_d)


def missing(model: Any = None) -> str | None:
    return absence("mlsd", WEIGHTS, model)


def _build(file: Path) -> Any:
    aux = annotator("mlsd")
    return aux.MLSDdetector(fill(aux.MobileV2_MLSD_Large, file))
