"""Lines of drawings (Say et al., Anime2Sketch, 2021), by controlnet_aux."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import absence, annotator, fill, find, look

RESOLUTION, MULTIPLE = 512, 64
WEIGHTS = "netG.pth"


def detect(image: Image.Image, *, model: Any = None) -> Image.Image:
    """White lines on black, RGB, of the picture's size.

    Args:
        model: a folder with netG.safetensors, that file, or a hub id.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    return look(image, _build, find("lineart_anime", WEIGHTS, model))


def missing(model: Any = None) -> str | None:
    return absence("lineart_anime", WEIGHTS, model)


def _build(file: Path) -> Any:
    from torch.nn import InstanceNorm2d

    aux = annotator("lineart_anime")
    build = partial(aux.UnetGenerator, 3, 1, 8, norm_layer=partial(InstanceNorm2d, affine=False))
    return aux.LineartAnimeDetector(fill(build, file))
