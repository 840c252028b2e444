"""A network as a function of a flat list of tensors, which exporters and other runtimes take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_kit.sampling.doors import Tree


def leaves(tree: Tree) -> list[Tensor]:
    """Every tensor of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def version(value: Tensor) -> object:
    """Differs after the tensor was written to."""
    return object() if value.is_inference() else value._version


def filled(tree: Tree, values: Iterable[Tensor]) -> Tree:
    """The tree with other tensors in place of its own, in order."""
    return _filled(tree, iter(values))


def _filled(tree: Tree, values: Iterator[Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        return next(values)
    if isinstance(tree, Mapping):
        return {name: _filled(part, values) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [_filled(part, values) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


class Flat(nn.Module):
    """A network over the list of its tensors, which gives the list of its outputs, all of them in float32 where they would
    be in bfloat16."""

    def __init__(self, network: Any, inputs: Tree) -> None:
        super().__init__()
        self.nets = nn.ModuleList(network.executed)
        self.network, self.like = network, without_numbers(inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        own = [value.to(like.dtype) for value, like in zip(tensors, leaves(self.like), strict=True)]
        return tuple(wide(value) for value in leaves(self.network(*filled(self.like, own))))


def wide(value: Tensor) -> Tensor:
    """In float32 instead of bfloat16, which not everybody knows."""
    return value.float() if value.dtype == torch.bfloat16 else value


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a card the current one, on which graphs and compiled code run."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain(value: Tensor) -> Tensor:
    """As a runtime takes it, which knows of shapes and not of strides: wide, and contiguous."""
    return wide(value).contiguous()


def without_numbers(tree: Tree) -> Tree:
    """The tree with tensors that have shapes and types only."""
    return filled(tree, [torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for leaf in leaves(tree)])


def outputs_of(network: Any, inputs: Tree) -> Tree:
    """What a network gives, without numbers: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return without_numbers(network(*filled(inputs, [mode.from_tensor(leaf) for leaf in leaves(inputs)])))
