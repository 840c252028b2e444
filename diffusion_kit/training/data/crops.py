"""Shapes that pictures are brought to, and what part of a picture is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDEST = 2.0  # aspect ratio of the outermost bucket


@dataclass(frozen=True)
class Crop:
    """A picture is scaled to `scaled` (width, height), of which `size` at (left, top) is kept."""

    scaled: tuple[int, int]
    size: tuple[int, int]
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.left + self.size[0], self.top + self.size[1])

    def part_of(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box in a picture of that size, before it is scaled."""
        wide, high = (whole / scaled for whole, scaled in zip(size, self.scaled, strict=True))
        left, top, right, bottom = self.box
        return left * wide, top * high, min(right * wide, size[0]), min(bottom * high, size[1])


def bucket_sizes(resolution: int, buckets: int, step: int) -> list[tuple[int, int]]:
    """(width, height) of the square and of so many other shapes, each with about resolution^2 pixels.

    Aspect ratios are spread evenly on a logarithmic scale up to 2 : 1.
    """
    half = buckets // 2
    ratios = [WIDEST ** (k / half) for k in range(-half, half + 1)] if half else [1.0]

    def rounded(side: float) -> int:
        return max(step, round(side / step) * step)

    sizes = [(rounded(resolution * r**0.5), rounded(resolution / r**0.5)) for r in ratios]
    if not half:
        sizes = [(resolution, resolution)]
    return list(dict.fromkeys(sizes))


def nearest_bucket(size: tuple[int, int], sizes: list[tuple[int, int]]) -> int:
    """The bucket whose aspect ratio is nearest, on a logarithmic scale."""
    ratios = np.log([w / h for w, h in sizes])
    return int(np.abs(ratios - np.log(size[0] / size[1])).argmin())


def make_crop(picture: tuple[int, int], size: tuple[int, int], variant: int | None, key: tuple[int, ...] = ()) -> Crop:
    """How a picture (width, height) fills `size`: in the middle, or at the place that random variant has for `key`."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    scaled = (max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale)))
    spare = (scaled[0] - size[0], scaled[1] - size[1])
    if variant is None:
        return Crop(scaled, size, spare[0] // 2, spare[1] // 2)
    rng = np.random.default_rng([*key, variant])
    return Crop(scaled, size, int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1)))
