"""The picture without its colours, for controls that colour it."""

from __future__ import annotations

from PIL import Image


def detect(image: Image.Image) -> Image.Image:
    """Luma (ITU-R BT.601), RGB with equal channels, of the picture's size."""
    return image.convert("L").convert("RGB")
