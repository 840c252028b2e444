"""A moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """mean <- d mean + (1 - d) weight, with d rising to `decay` over the first steps, so that the start is forgotten."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.means = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        now = [weights[name].detach() for name in self.means]
        torch._foreach_lerp_(list(self.means.values()), now, 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in self.means.items():
            mean.copy_(tensors[name])
