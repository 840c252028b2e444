"""Line drawings: what is darker than its surroundings."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

RESOLUTION = 512
AROUND = 48  # pixels; of the Gaussian that tells how dark lines are at a place
FAINT = 0.5  # levels of 255; far fainter lines, as of noise on a flat ground, are not drawn
LEAST, MOST = 0.5, 3.5  # how many times as dark as is usual there: drawn black, drawn white


def detect(image: Image.Image, *, coarse: bool = False, model: Any = None) -> Image.Image:
    """White lines on black, RGB, of the picture's size.

    Args:
        coarse: broader lines, or those of the network for coarse lines.
        model: a folder with sk_model.safetensors (sk_model2.safetensors for `coarse`), that file, or a hub id: a network's
            lines (Chan et al., 2022, arXiv:2203.12691) instead.

    Raises:
        With a model:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    if model is not None:
        from diffusion_kit.adapters.detectors._networks import learned_lineart

        return learned_lineart(image, model, coarse=coarse)
    import cv2

    colours, width = np.asarray(image, np.float32), 2.0 if coarse else 1.0
    ground, line = (cv2.GaussianBlur(colours, (0, 0), sigma) for sigma in (3 * width, width))
    darkness = (ground - line).max(2).clip(0)
    usual = cv2.GaussianBlur(darkness, (0, 0), AROUND) + darkness.mean() + FAINT
    lines = (darkness / usual - LEAST) / (MOST - LEAST)
    return Image.fromarray((255 * lines.clip(0, 1)).astype(np.uint8)).convert("RGB")


def missing(model: Any = None) -> str | None:
    from diffusion_kit.adapters.detectors._networks import LINEART, absence

    return None if model is None else absence("lineart", LINEART, model)
