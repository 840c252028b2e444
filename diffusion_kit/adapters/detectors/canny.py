"""Edges after Canny (1986), by OpenCV."""

from __future__ import annotations

import numpy as np
from PIL import Image

STEEPEST = 2040  # largest gradient of bytes: 4 * 255 in both directions


def detect(image: Image.Image, *, low: float = 100, high: float = 200) -> Image.Image:
    """White edges of one pixel on black, RGB, of the picture's size.

    Args:
        low, high: thresholds on the gradient, 0 <= low <= high <= 2040, which no gradient exceeds; edges above `high` are
            followed down to `low`.

    Raises:
        ValueError: thresholds out of range.
    """
    if not 0 <= low <= high <= STEEPEST:
        raise ValueError(f"low is {low} and high {high}; they must be 0 <= low <= high <= {STEEPEST}")
    import cv2

    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")
