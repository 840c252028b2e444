"""Flat areas of few colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

RESOLUTION = 512
RESAMPLE = Image.Resampling.NEAREST  # anything else would mix the areas' colours
TIDY = 15  # pixels; side of the square in which the most frequent colour wins
SETTLED = 100  # pixels; k-means ends when fewer than these change their cluster


def detect(image: Image.Image, *, colours: int = 8, apart: float = 0.7) -> Image.Image:
    """The picture in areas of one colour each, their mean, RGB, of its size.

    Args:
        colours: how many at most, 2 to 256.
        apart: how far their colours are from one another at least, so that shading does not split an area: as a share of
            how widely the picture's own are spread (standard deviation in CIE Lab with half its lightness), 0 or more.

    Raises:
        ValueError: colours or apart out of range.
    """
    if not 2 <= colours <= 256:
        raise ValueError(f"colours is {colours}; it must be 2 to 256")
    if not apart >= 0:
        raise ValueError(f"apart is {apart}; it must be 0 or more")
    import cv2

    pixels = np.asarray(image)
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] //= 2  # shading splits an area less than hue does
    clusters = Image.fromarray(lab).quantize(colours, Image.Quantize.MEDIANCUT, SETTLED, dither=Image.Dither.NONE)
    spread = float(np.linalg.norm(cv2.meanStdDev(lab)[1]))
    joined = joins(*means(np.asarray(clusters), lab, colours), apart * spread)[np.asarray(clusters)]
    area = most_frequent(joined)
    return Image.fromarray(means(area, pixels, colours)[0].round().astype(np.uint8)[area])


def most_frequent(area: np.ndarray) -> np.ndarray:
    """(H, W): the number that is most frequent in the square about each pixel, of equals the least."""
    import cv2

    numbers = np.unique(area)
    masks = [(area == number).astype(np.uint8) for number in numbers]
    outside = cv2.BORDER_CONSTANT  # counts for no number
    counts = [cv2.boxFilter(mask, cv2.CV_16U, (TIDY, TIDY), normalize=False, borderType=outside) for mask in masks]
    return numbers[np.argmax(counts, 0)]


def means(area: np.ndarray, pixels: np.ndarray, colours: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours (colours, 3) of the areas (H, W) of a picture (H, W, 3), and how many pixels each has."""
    counts = np.bincount(area.ravel(), minlength=colours)
    sums = [np.bincount(area.ravel(), channel.ravel(), colours) for channel in np.moveaxis(pixels, 2, 0)]
    return np.stack(sums, 1) / counts.clip(1)[:, None], counts


def joins(centres: np.ndarray, counts: np.ndarray, apart: float) -> np.ndarray:
    """(n,) bytes: which cluster each one belongs to, when again and again the two with the nearest centres (n, 3) are made
    one, until there are two or they are `apart`."""
    centres, counts, own = centres.copy(), counts.astype(float), np.arange(len(counts), dtype=np.uint8)
    while (counts > 0).sum() > 2:
        distances = np.linalg.norm(centres[:, None] - centres, axis=2)
        distances[(counts == 0)[:, None] | (counts == 0) | np.eye(len(counts), dtype=bool)] = np.inf
        a, b = np.unravel_index(distances.argmin(), distances.shape)
        if distances[a, b] >= apart:
            break
        centres[a] = np.average(centres[[a, b]], axis=0, weights=counts[[a, b]])
        counts[a], counts[b] = counts[a] + counts[b], 0
        own[own == b] = a
    return own
