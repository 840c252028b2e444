"""Blur, for controls that sharpen."""

from __future__ import annotations

from PIL import Image, ImageFilter

RESOLUTION = 512


def detect(image: Image.Image, *, radius: float = 8) -> Image.Image:
    """The picture under a Gaussian blur, RGB, of its size.

    Args:
        radius: standard deviation of the Gaussian in pixels, above 0 and at most 1000.

    Raises:
        ValueError: radius out of range.
    """
    if not 0 < radius <= 1000:
        raise ValueError(f"radius is {radius}; it must be above 0 and at most 1000")
    return image.filter(ImageFilter.GaussianBlur(radius))
