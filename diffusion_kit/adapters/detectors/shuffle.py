"""The picture's colours and textures without its shapes, as for ControlNet's content shuffle."""

from __future__ import annotations

import numpy as np
from PIL import Image

CELLS = 5  # of the random grid along the longer side


def detect(image: Image.Image, *, seed: int = 0) -> Image.Image:
    """The picture warped by two smooth random fields, RGB, of its size.

    The fields are whole numbers and pixels are taken as they are: a seed gives the same picture on every machine.

    Args:
        seed: 0 or more.

    Raises:
        ValueError: seed out of range.
    """
    if not seed >= 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    random = np.random.default_rng(seed)
    x, y = (_coordinates(random, image.size, side) for side in image.size)
    return Image.fromarray(np.asarray(image)[y, x])


def _coordinates(random: np.random.Generator, size: tuple[int, int], side: int) -> np.ndarray:
    """(H, W) of 0 ... side - 1, smooth, and each about equally often: that keeps the picture's colours."""
    columns, rows = (max(2, round(CELLS * length / max(size)) + 1) for length in size)
    grid = Image.fromarray(random.integers(0, 1 << 16, (rows, columns), np.int32))
    field = np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
    field = field - field.min()
    rank = np.bincount(field.ravel()).cumsum() - 1
    return rank[field] * side // field.size
