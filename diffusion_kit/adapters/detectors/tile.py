"""The picture without its detail, for tile controls, which paint it anew."""

from __future__ import annotations

from PIL import Image

from diffusion_kit.adapters.pictures import resize


def detect(image: Image.Image, *, factor: float = 8) -> Image.Image:
    """The picture made smaller and brought back to its size, RGB.

    Args:
        factor: how many times smaller, 1 or more.

    Raises:
        ValueError: factor out of range.
    """
    if not factor >= 1:
        raise ValueError(f"factor is {factor}; it must be 1 or more")
    width, height = (max(1, round(side / factor)) for side in image.size)
    return resize(resize(image, (width, height), Image.Resampling.BOX), image.size, Image.Resampling.BICUBIC)
