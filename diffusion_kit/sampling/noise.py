"""Random tensors from each image's own generator, in the order in which diffusers draws them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise of `shape` (B, ...).

    With a list of B generators image k is drawn from generator k, so it is the same alone and in a batch. A CPU
    generator draws on the CPU, whatever the device: the same seed gives the same noise everywhere.

    Raises:
        ValueError: the list has another length than the batch.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images: give one generator, or one per image")
        return torch.cat([draw((1, *shape[1:]), one, device, dtype) for one in generator])
    source = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
