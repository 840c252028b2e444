"""Flat areas of few colours."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

RESOLUTION = 512
RESAMPLE = Image.Resampling.NEAREST  # anything else would mix the areas' colours
TIDY = 15  # pixels; side of the square in which the most frequent colour wins
SETTLED = 100  # pixels; k-means ends when fewer than these change their cluster


def detect(image: Image.Image, *, colours: int = 8) -> Image.Image:
    """The picture in areas of one colour each, their mean, RGB, of its size.

    Args:
        colours: how many at most, 2 to 256.

    Raises:
        ValueError: colours out of range.
    """
    if not 2 <= colours <= 256:
        raise ValueError(f"colours is {colours}; it must be 2 to 256")
    import cv2

    pixels = np.asarray(image)
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] //= 2  # shading splits an area less than hue does
    clusters = Image.fromarray(lab).quantize(colours, Image.Quantize.MEDIANCUT, SETTLED, dither=Image.Dither.NONE)
    area = np.asarray(Image.fromarray(np.asarray(clusters)).filter(ImageFilter.ModeFilter(TIDY)))
    counts = np.bincount(area.ravel(), minlength=colours).clip(1)
    sums = [np.bincount(area.ravel(), channel.ravel(), colours) for channel in np.moveaxis(pixels, 2, 0)]
    return Image.fromarray((np.stack(sums, 1) / counts[:, None]).round().astype(np.uint8)[area])
