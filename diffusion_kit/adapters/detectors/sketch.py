"""Strokes along the outlines: edges that show at several scales and stand out from what is around them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

RESOLUTION = 512
LINES = True

# lengths in pixels
SCALES = (1, 2, 4)  # of the Gaussians; grain shows at the finest only
AROUND = 64  # of the Gaussian that tells how busy a place is
SHORTEST = 40  # strokes below this are left out

FAINT = 0.3  # units of CIE Lab; far weaker edges, as of noise on a flat ground, never stand out
UNIT = 1000  # Canny takes whole numbers


def detect(image: Image.Image, *, threshold: float = 1.0, model: Any = None) -> Image.Image:
    """White strokes of three pixels on black, RGB, of the picture's size.

    Args:
        threshold: how much a stroke must stand out from what is around it, above 0; more gives fewer strokes. Strokes are
            followed down to half of it. Without a model only.
        model: weights of PiDiNet, as in detector pidinet, whose edges above one half are drawn.

    Raises:
        ValueError: threshold out of range. With a model, what detector pidinet raises.
    """
    if model is not None:
        from diffusion_kit.adapters.detectors._networks import learned_sketch

        return learned_sketch(image, model)
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be above 0")
    import cv2

    strength, direction = _edges(image)
    usual = cv2.GaussianBlur(strength, (0, 0), AROUND) + strength.mean() + FAINT
    dx, dy = (UNIT * strength / usual * direction).clip(-32767, 32767).astype(np.int16)
    strokes = cv2.Canny(dx, dy, UNIT * threshold / 2, UNIT * threshold, L2gradient=True)
    _, stroke_of, statistics, _ = cv2.connectedComponentsWithStats(strokes)
    strokes[statistics[stroke_of, cv2.CC_STAT_AREA] < SHORTEST] = 0
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    return Image.fromarray(cv2.dilate(strokes, disc)).convert("RGB")


def missing(model: Any = None) -> str | None:
    from diffusion_kit.adapters.detectors._networks import PIDINET, absence

    return None if model is None else absence("sketch", PIDINET, model)


def _edges(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Geometric mean over the scales of how strong edges are (H, W), and unit vectors across them (2, H, W)."""
    import cv2

    lab = cv2.cvtColor(np.asarray(image, np.float32) / 255, cv2.COLOR_RGB2LAB)
    product = np.ones(lab.shape[:2], np.float32)
    for scale in SCALES:
        smooth = cv2.GaussianBlur(lab, (0, 0), scale)
        gradient = np.stack([cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)]) * (scale / 8)  # (2, H, W, 3)
        lengths = np.hypot(*gradient)
        clearest = lengths.argmax(2)[..., None]  # of the three channels
        length = np.take_along_axis(lengths, clearest, 2)[..., 0]
        direction = np.take_along_axis(gradient, clearest[None], 3)[..., 0] / np.maximum(length, 1e-6)
        product *= length
    return product ** (1 / len(SCALES)), direction
