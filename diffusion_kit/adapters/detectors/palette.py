"""Colours and roughly where they are, in coarse blocks."""

from __future__ import annotations

from PIL import Image

from diffusion_kit.adapters.pictures import resize

RESAMPLE = Image.Resampling.NEAREST  # anything else would mix the blocks' colours


def detect(image: Image.Image, *, blocks: int = 8) -> Image.Image:
    """Blocks of the picture's mean colours, RGB, of its size, as T2I-Adapter's palettes (Mou et al., 2023,
    arXiv:2302.08453, section 3.3).

    Args:
        blocks: how many along the shorter side, 1 or more; the default gives blocks of 64 pixels in a picture of 512.

    Raises:
        ValueError: blocks out of range.
    """
    if not blocks >= 1:
        raise ValueError(f"blocks is {blocks}; it must be 1 or more")
    scale = min(1, blocks / min(image.size))
    width, height = (round(side * scale) for side in image.size)
    return resize(resize(image, (width, height), Image.Resampling.BOX), image.size, Image.Resampling.NEAREST)
