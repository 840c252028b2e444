"""Surface normals after Bae et al. (2021, arXiv:2109.09881), by controlnet_aux."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import absence, annotator, fill, find, look

RESOLUTION, MULTIPLE = 512, 64
WEIGHTS = "scannet.pt"
# the decoder asks for all of them, though the last two are of its training
SETTINGS = SimpleNamespace(architecture="BN", sampling_ratio=0.4, importance_ratio=0.7)


def detect(image: Image.Image, *, model: Any = None) -> Image.Image:
    """Unit normals, each of x, y, z in [-1, 1] as [0, 255], RGB, of the picture's size.

    Args:
        model: a folder with scannet.safetensors, that file, or a hub id.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    return look(image, _build, find("normal", WEIGHTS, model))


def missing(model: Any = None) -> str | None:
    return absence("normal", WEIGHTS, model)


def _build(file: Path) -> Any:
    aux = annotator("normalbae")
    return aux.NormalBaeDetector(fill(lambda: aux.NNET(SETTINGS), file))
