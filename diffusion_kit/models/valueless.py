"""Networks whose tensors have shapes and no values (torch's FakeTensorMode): what would be computed with them can be
counted, and takes no memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def valueless(cls: Any, configuration: str, dtype: torch.dtype, device: str) -> Iterator[Any]:
    """One of diffusers' networks of a configuration, as JSON; tensors that are made inside the block have no values
    either."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), torch.no_grad():
        net = cls.from_config(json.loads(configuration))
        yield converted(net, lambda own: own.to(dtype) if own.is_floating_point() else own).eval()


def converted(net: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, by which networks change number type or device: torch's own cannot exchange fake tensors."""
    made: dict[Any, Tensor] = {}

    def once(own: Tensor) -> Tensor:  # for a weight that several modules have; one that stays as it is stays itself
        if own not in made:
            old = own.detach()
            new = fn(old)
            made[own] = (
                own if new is old else nn.Parameter(new, own.requires_grad) if isinstance(own, nn.Parameter) else new
            )
        return made[own]

    for part in net.modules() if recurse else [net]:
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: once(own) for name, own in tensors.items() if own is not None})
    return net
