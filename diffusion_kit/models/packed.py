"""Linear and convolution layers of a CPU whose weights lie in oneDNN's own blocked layout while nobody looks at them.

torch gives float32 linear layers to a library that is half as fast on some CPUs, and lays a convolution's weight out anew
in every call. A packed layer computes with the laid-out weight and holds no other copy of it, so memory stays what it was.

Whoever looks at a packed layer's parameters (saving, LoRA, `.to`, loading, an edit by hand, a copy) finds a plain layer
with the same bits: the look itself unpacks it. So nothing can be stale, and the next run packs it again.

The operations are torch's own, those of its compiler, but private: `obstacle` tries them first.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree
from diffusion_kit.sampling.engines import StepFunction
from diffusion_kit.sampling.step import Step

CHANNELS_LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16)


class Weight(NamedTuple):
    """
    Attributes:
        tensor: the weight in oneDNN's layout.
        plain: the parameter it was made of, which lives on only while somebody else holds it.
        version: of that parameter's contents.
        trained: whether it requires a gradient.
    """

    tensor: Tensor
    plain: weakref.ref[nn.Parameter]
    version: int
    trained: bool


class Packed(nn.Module):
    """What a packed layer's class has beside those of its plain one."""

    @property
    def weight(self) -> Any:
        return unpack(self).weight

    @property
    def _parameters(self) -> Any:  # type: ignore[override]
        return unpack(self)._parameters

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(unpack(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unpack(self).__reduce_ex__(protocol)

    def fits(self, x: Tensor) -> bool:
        """Whether the packed operation may stand for the plain one: it knows no gradients and no autocast."""
        own: Weight = self.__dict__["_packed"]
        return (
            x.dtype == own.tensor.dtype
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        if not self.fits(input):
            return unpack(self)(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.__dict__["_packed"].tensor, self.bias, "none", [], "")


class PackedConv2d(Packed, nn.Conv2d):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        if not self.fits(input):
            return unpack(self)(input)
        x = input.contiguous(memory_format=CHANNELS_LAST)
        weight, geometry = self.__dict__["_packed"].tensor, geometry_of(self)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, "none", [], "")


CLASSES: dict[type[nn.Module], type[Packed]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def geometry_of(layer: Any) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups of a convolution."""
    return list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups


@cache
def obstacle() -> str | None:
    """Why nothing can be packed here; None if it can: the operations are there and give what plain layers give."""
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            for layer, x in ((nn.Linear(16, 32), torch.ones(2, 16)), (nn.Conv2d(16, 32, 3), torch.ones(2, 16, 8, 8))):
                expected = layer(x)
                pack_layer(layer)
                if not torch.allclose(layer(x), expected, atol=1e-5):
                    return "oneDNN's packed layers give other numbers than torch's own"
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this torch has no packed layers: {str(error).splitlines()[0]}"
    return None


class Packing:
    """Engine that runs the step as it is, over networks whose layers it keeps packed.

    A layer that shares its weight with another (a Control-LoRA's with the UNet's) stays plain: apart, they would be two.
    """

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        found = [
            layer for net in nets for layer in net.modules() if type(layer) in CLASSES or isinstance(layer, Packed)
        ]
        holders = Counter(id(layer._parameters.get("weight")) for layer in found if not isinstance(layer, Packed))
        self.layers = [
            layer for layer in found if isinstance(layer, Packed) or holders[id(layer._parameters["weight"])] == 1
        ]

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        """Packs again what was looked at since the last step."""
        for layer in self.layers:
            pack_layer(layer)
        return step


def pack_layer(layer: Any) -> bool:
    """Packs a layer, if it can be; whether it is."""
    if isinstance(layer, Packed):
        own: Weight = layer.__dict__["_packed"]
        if (plain := own.plain()) is None or plain._version == own.version:
            return True
        unpack(layer)
    if not can_be_packed(layer):
        return False
    weight = layer._parameters.pop("weight")
    layer.__dict__["_packed"] = Weight(
        laid_out(layer, weight.detach()), weakref.ref(weight), weight._version, weight.requires_grad
    )
    layer.__class__ = CLASSES[type(layer)]
    return True


def can_be_packed(layer: Any) -> bool:
    weight = layer._parameters.get("weight")
    return (
        type(layer) in CLASSES
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and "forward" not in vars(layer)
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and not isinstance(getattr(layer, "padding", None), str)
    )


def laid_out(layer: Any, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry_of(layer))


def unpack(layer: Any) -> Any:
    """The layer as it was, with the parameter that somebody holds, or one of the same bits."""
    own: Weight = layer.__dict__.pop("_packed")
    layer.__class__ = next(plain for plain, packed in CLASSES.items() if type(layer) is packed)
    weight = own.plain()
    if weight is None:
        weight = nn.Parameter(own.tensor.to_dense(), own.trained)
    layer._parameters = {"weight": weight, **layer._parameters}  # in the order in which they were
    return layer


def unpack_all(nets: Iterable[nn.Module]) -> None:
    """For an engine that wants plain layers."""
    for layer in [layer for net in nets for layer in net.modules() if isinstance(layer, Packed)]:
        unpack(layer)
