"""The Inception network of FID and KID: TensorFlow's of 2015 (Szegedy et al., arXiv:1512.00567), in torchvision's parts.

It differs from torchvision's own in three pools and in how a picture is resized; both count: distances of other features
compare with no published figure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception as parts

from diffusion_kit.adapters.detectors._networks import fill
from diffusion_kit.adapters.pictures import picture_tensor

SIDE = 299
CLASSES = 1008


def features(file: Path) -> Callable[[Image.Image], np.ndarray]:
    """From a picture to its (2048,) features, by the weights of a safetensors file.

    Raises:
        ValueError: a file of another network.
    """
    net = fill(network, file)
    net.fc = nn.Identity()

    @torch.no_grad()
    def of(picture: Image.Image) -> np.ndarray:
        pixels = 255 * picture_tensor(picture, picture.height, picture.width)
        return net((resized(pixels) - 128) / 128)[0].numpy()

    return of


def network() -> Any:
    blocks = [parts.BasicConv2d, _A, parts.InceptionB, _C, parts.InceptionD, _E, parts.InceptionAux]
    net = parts.Inception3(CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
    net.Mixed_7c = _Last(2048)
    return net


def resized(pixels: Tensor) -> Tensor:
    """(N, C, 299, 299), bilinear as TensorFlow 1 has it: corners, not centres, of pixels meet; smaller ones are skipped."""
    for dim in (2, 3):
        length = pixels.shape[dim]
        at = torch.arange(SIDE) * (length / SIDE)
        low = at.long()
        share = (at - low).reshape(-1, 1) if dim == 2 else at - low
        here, next_ = pixels.index_select(dim, low), pixels.index_select(dim, (low + 1).clamp(max=length - 1))
        pixels = here.lerp(next_, share)
    return pixels


class _Unpadded:
    """Means over what is inside the picture only."""

    branch_pool: nn.Module

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)
        return [*others, self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))]


class _A(_Unpadded, parts.InceptionA):
    pass


class _C(_Unpadded, parts.InceptionC):
    pass


class _E(_Unpadded, parts.InceptionE):
    pass


class _Last(parts.InceptionE):
    """The last block, which takes the largest."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)
        return [*others, self.branch_pool(F.max_pool2d(x, 3, 1, 1))]
