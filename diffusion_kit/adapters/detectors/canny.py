"""Edges after Canny (1986), by OpenCV."""

from __future__ import annotations

import numpy as np
from PIL import Image


def detect(image: Image.Image, *, low: float = 100, high: float = 200) -> Image.Image:
    """White edges of one pixel on black, RGB, of the picture's size.

    Args:
        low, high: thresholds on the gradient; edges above `high` are followed down to `low`.
    """
    import cv2

    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")
