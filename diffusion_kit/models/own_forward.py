"""A network that runs through its own forward behind the signature of the sampling core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusion_kit.sampling.doors import Conditioning, Tree

from .attention import Net


@dataclass(frozen=True)
class OwnForward:
    """What such denoisers share: nothing is made before the loop, and no attention is replaced."""

    net: Net
    own_forward: ClassVar[bool] = True

    @property
    def executed(self) -> tuple[Net, ...]:
        return ()

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        return {"timesteps": timesteps, **conditioning}
