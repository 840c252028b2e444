"""A moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """mean <- d mean + (1 - d) weight, with d rising to `decay` over the first steps, so that the start is forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.means.values()), [p.detach() for p in self.weights.values()], 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in self.means.items():
            mean.copy_(tensors[name])

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The module has the means inside the block, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self.means[name] = self.means[name], weight.data
