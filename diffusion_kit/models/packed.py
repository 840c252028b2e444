"""Linear and convolution layers of a CPU whose weights lie in oneDNN's own blocked layout while nobody looks at them.

torch gives float32 linear layers to a library that is half as fast on some CPUs, and lays a convolution's weight out anew
in every call. A packed layer computes with the laid-out weight and holds no other copy of it. A gated layer (GEGLU) is two
products, of which the first ends with gelu and, on processors that are fast in it, the second with the gate. What a
transformer makes of a picture keeps its channels last, as packed convolutions take it.

Whoever looks at a packed layer's parameters (saving, LoRA, `.to`, loading, an edit by hand, a copy) or sets anything of it
finds a plain layer with the same bits: the look itself unpacks it. A weight that anybody else holds is not packed. So
nothing can be stale, and the next step packs again.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree
from diffusion_kit.sampling.engines import Engine, StepFunction
from diffusion_kit.sampling.engines.pages import FilePages
from diffusion_kit.sampling.engines.weights import is_parked
from diffusion_kit.sampling.step import Step

from . import onednn
from .tiled_attention import tiled_attention


class Weight(NamedTuple):
    """A weight in oneDNN's layout, whole or in two halves one below the other, whether it requires a gradient, a number
    that no other has, and for which shape of a convolution's input and how many threads it is laid out."""

    parts: tuple[Tensor, ...]
    trained: bool
    number: int
    suits: tuple[torch.Size, int] | None = None

    @classmethod
    def of(cls, layer: Any, pieces: int = 1) -> Weight:
        weight = layer._parameters["weight"]
        with torch.inference_mode(False):
            parts = tuple(onednn.laid_out(layer, part) for part in weight.detach().chunk(pieces))
        return cls(parts, weight.requires_grad, next(NUMBERS))

    def plain(self) -> nn.Parameter:
        with torch.inference_mode(False):
            parts = [part.to_dense() for part in self.parts]
            return nn.Parameter(parts[0] if len(parts) == 1 else torch.cat(parts), self.trained)

    def suiting(self, layer: Any, shape: torch.Size) -> Weight:
        """The same weight in the layout that oneDNN wants for a convolution of such an input."""
        suits = shape, torch.get_num_threads()
        if self.suits == suits:
            return self
        with torch.inference_mode(False):
            return self._replace(parts=(onednn.laid_out(layer, self.parts[0].to_dense(), shape),), suits=suits)

    def fits(self, x: Tensor) -> bool:
        """Whether the packed operation may stand for the plain one: it knows no gradients and no autocast."""
        return (
            x.dtype == self.parts[0].dtype
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


class Packed(nn.Module):
    """What a packed layer's class has beside those of its plain one."""

    @property
    def weight(self) -> Any:
        return unpack(self).weight

    @property
    def _parameters(self) -> Any:  # type: ignore[override]
        return unpack(self)._parameters

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(unpack(self), name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(unpack(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unpack(self).__reduce_ex__(protocol)


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        own: Weight | None = self.__dict__.get("_packed")
        if own is None or not own.fits(input):
            return nn.Linear.forward(unpack(self), input)
        if len(own.parts) == 1:
            return onednn.product(input, own.parts[0], self.bias)
        biases = (None,) * len(own.parts) if self.bias is None else self.bias.chunk(len(own.parts))
        made = [onednn.product(input, part, bias) for part, bias in zip(own.parts, biases, strict=True)]
        return torch.cat(made, -1)


class PackedConv2d(Packed, nn.Conv2d):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        own: Weight | None = self.__dict__.get("_packed")
        if own is None or input.ndim != 4 or not own.fits(input):
            return nn.Conv2d.forward(unpack(self), input)
        suiting = own.suiting(self, input.shape)
        if self.__dict__.get("_packed") is own:  # nobody has looked at it meanwhile
            self.__dict__["_packed"] = suiting
        return onednn.convolution(input, self, suiting.parts[0])


class Lent(nn.Module):
    """What a module has in another class of its own while its layers are packed: copies of it are plain."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        give_back(self)
        return self.__reduce_ex__(protocol)


class PackedGEGLU(Lent, GEGLU):
    """x V^T * gelu(x G^T) in two products, where its layer's weight [V; G] is packed in halves; else as it was."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.proj
        own: Weight | None = vars(layer).get("_packed")
        hooked = own is not None and (layer._forward_hooks or layer._forward_pre_hooks)
        if own is None or hooked or len(own.parts) == 1 or not own.fits(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
        value, gate = own.parts
        return onednn.gated(hidden_states, value, gate, biases)


class PackedTransformer(Lent, Transformer2DModel):
    """Its tokens (B, H W, C) are a picture (B, C, H, W) with its channels last, and its output stays one: else the layers
    behind it have to lay their inputs out anew, up to its next convolution and down every skip connection."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        project: Any = self.proj_out
        h = project(hidden_states) if self.use_linear_projection else hidden_states
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (h if self.use_linear_projection else project(h)) + residual  # in the layout of the first


NUMBERS = count()
CLASSES: dict[type[nn.Module], type[Packed]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
LENT: dict[type[nn.Module], type[Lent]] = {GEGLU: PackedGEGLU, Transformer2DModel: PackedTransformer}


class Packing(Engine):
    """Runs everything as it is, over networks whose layers it keeps packed."""

    name = "packed"
    attention = staticmethod(tiled_attention)

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[nn.Module] = []

    def begin(self, nets: Iterable[nn.Module]) -> None:
        self.layers = layers_of(nets)

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        """Packs again what was looked at since the last step."""
        pack_all(self.layers)
        return step

    def network(self, network: Any) -> Any:
        pack_all(layers_of(network.executed))
        return network


def held_by(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, of a packed layer as they lie: to look at them otherwise would unpack it."""
    own: Weight | None = vars(module).get("_packed")
    plain = [value for value in vars(module)["_parameters"].values() if value is not None]
    return plain if own is None else [*plain, *own.parts]


def layers_of(nets: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers that can be packed, and modules with a class for packed layers, which come before theirs."""
    kinds = (*CLASSES, *CLASSES.values(), *LENT, *LENT.values())
    return [layer for net in nets for layer in net.modules() if type(layer) in kinds]


def pack_all(layers: Iterable[nn.Module]) -> None:
    if torch.is_autocast_enabled("cpu"):
        return
    pages = FilePages()
    for layer in layers:
        if isinstance(layer, GEGLU):
            layer.__class__ = PackedGEGLU if pack_layer(layer.proj, pages, 2) else GEGLU
        elif isinstance(layer, Transformer2DModel):
            layer.__class__ = PackedTransformer
        else:
            pack_layer(layer, pages)


def pack_layer(layer: Any, pages: FilePages | None = None, pieces: int = 1) -> bool:
    """Packs a layer, if it can be; whether it is. Pages of its weight that lie in a file leave memory."""
    if isinstance(layer, Packed):
        return True
    if not can_be_packed(layer):
        return False
    weight, others = layer._parameters["weight"], {n: p for n, p in layer._parameters.items() if n != "weight"}
    packed = Weight.of(layer, pieces)
    if pages is not None:
        pages.forget(weight)
    # The weight goes last: an interrupt leaves a whole layer.
    layer.__dict__["_packed"] = packed
    layer.__class__ = CLASSES[type(layer)]
    layer.__dict__["_parameters"] = others
    return True


def unpack(layer: Any) -> Any:
    """The layer as it was, its weight of the same bits."""
    own: Weight | None = layer.__dict__.get("_packed")
    if own is not None:
        layer.__dict__["_parameters"] = {"weight": own.plain(), **layer.__dict__["_parameters"]}
        object.__setattr__(layer, "__class__", next(cls for cls in type(layer).__mro__ if cls in CLASSES))
        layer.__dict__.pop("_packed", None)
    return layer


def unpack_all(nets: Iterable[nn.Module]) -> None:
    """For an engine that wants plain layers."""
    for layer in layers_of(nets):
        if isinstance(layer, Packed):
            unpack(layer)
        elif isinstance(layer, Lent):
            give_back(layer)


def give_back(module: nn.Module) -> None:
    """Gives a module its own class again."""
    module.__class__ = next(cls for cls in type(module).__mro__ if cls in LENT)


def can_be_packed(layer: Any) -> bool:
    # A weight of 8 bits has no memory of its own to be looked at; and a name for the weight here would be counted.
    if type(layer) not in CLASSES or type(layer._parameters.get("weight")) is not nn.Parameter:
        return False
    if references(layer) != alone():
        return False
    weight = layer._parameters["weight"]
    return (
        weight.device.type == "cpu"
        and onednn.obstacle(weight.dtype) is None
        and not (weight.is_inference() or weight.grad is not None or (weight.is_shared() and not is_parked(weight)))
        and not {"forward", "_conv_forward"} & vars(layer).keys()
        and getattr(layer, "padding_mode", "zeros") == "zeros"
        and not isinstance(getattr(layer, "padding", None), str)
    )


def references(layer: Any) -> tuple[int, int, int]:
    """How many hold a layer's weight: in Python, in torch, and its storage (a detached copy, a state dict)."""
    weight = layer._parameters["weight"]
    storage = weight.untyped_storage()
    return sys.getrefcount(weight), weight._use_count(), torch._C._storage_Use_Count(storage._cdata)


@cache
def alone() -> tuple[int, int, int]:
    """The references to a weight that only its layer holds."""
    with torch.inference_mode(False), torch.random.fork_rng([]):
        return references(nn.Linear(1, 1))
