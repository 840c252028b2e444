"""Soft edges after Su et al. (2021, arXiv:2108.07009), by controlnet_aux."""

from __future__ import annotations

from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import PIDINET, absence, find, look, pidinet

RESOLUTION, MULTIPLE = 512, 64


def detect(image: Image.Image, *, model: Any = None) -> Image.Image:
    """White soft edges on black, RGB, of the picture's size.

    Args:
        model: a folder with table5_pidinet.safetensors, that file, or a hub id.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    return look(image, pidinet, find("pidinet", PIDINET, model))


def missing(model: Any = None) -> str | None:
    return absence("pidinet", PIDINET, model)
