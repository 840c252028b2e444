"""What the attention of the executor sees, and the processors that make a network's attention see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, XFormersAttnAddedKVProcessor, XFormersAttnProcessor
from torch import Tensor, nn

from diffusion_kit.sampling.engines.weights import replaced

XFORMERS = (XFormersAttnProcessor, XFormersAttnAddedKVProcessor)
Net = Any  # a network of diffusers: its parts are attributes that the type of nn.Module does not know


class Tokens(NamedTuple):
    """What the queries of an attention layer see.

    Attributes:
        key, value: (B, heads, tokens, width).
        weight: of what comes of it, (B or 1, 1, queries or 1, 1); None is 1.
        bias: added to the scores, (B, 1, 1, tokens), or None.
    """

    key: Tensor
    value: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


Context = Mapping[str, tuple[Tokens, ...]]  # for each cross-attention layer the text's, and others attended beside them


def joint(layer: Attention) -> bool:
    """Whether the layer attends to text and picture at once, as Kandinsky 2.x does."""
    return layer.add_k_proj is not None


def attention_layers(net: nn.Module) -> list[tuple[str, Attention]]:
    return [(name, layer) for name, layer in net.named_modules() if isinstance(layer, Attention)]


def split_heads(layer: Attention, x: Tensor) -> Tensor:
    """(B, tokens, width) -> (B, heads, tokens, width / heads)"""
    return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)


Product = Callable[..., Tensor]  # of the signature of torch's scaled_dot_product_attention


def attend(query: Tensor, tokens: Tokens, product: Product = F.scaled_dot_product_attention) -> Tensor:
    """weight x softmax(Q K^T / sqrt(d) + bias) V, (B, heads, queries, width)."""
    out = product(query, tokens.key, tokens.value, tokens.bias)
    return out if tokens.weight is None else tokens.weight * out


@dataclass(frozen=True)
class XFormers:
    """xformers' product, by the operation that its processor was made with; torch's own where there is a bias, which
    xformers wants laid out for every query."""

    operation: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            return F.scaled_dot_product_attention(query, key, value, bias)
        from xformers.ops import memory_efficient_attention

        parts = (part.transpose(1, 2) for part in (query, key, value))  # (B, tokens, heads, width)
        return memory_efficient_attention(*parts, op=self.operation).transpose(1, 2)


def product_of(layers: Iterable[tuple[str, Attention]], product: Product) -> Product:
    """xformers' for a network on which diffusers has set it, else the one that is given."""
    processors = (layer.processor for _, layer in layers)
    own = next((own for own in processors if type(own) in XFORMERS), None)
    return product if own is None else XFormers(own.attention_op)


@dataclass(frozen=True)
class _Attend:
    """Attention processor of the executor: self-attention, or cross-attention to tokens made before, each attended by
    itself and added (arXiv 2308.06721, eq. 5)."""

    name: str
    product: Product

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Context | Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query = split_heads(attn, attn.to_q(hidden_states))
        if isinstance(encoder_hidden_states, Mapping):
            first, *others = encoder_hidden_states[self.name]
        else:
            first, others = (
                Tokens(*(split_heads(attn, project(hidden_states)) for project in (attn.to_k, attn.to_v))),
                [],
            )
        out = attend(query, first, self.product)
        for tokens in others:
            out = out + attend(query, tokens, self.product)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class _AttendJointly:
    """The same for layers that see text and picture (B, C, H, W) in one softmax."""

    name: str
    product: Product

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Context,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # (B, H W, C)
        ((key, value, *_),) = encoder_hidden_states[self.name]
        if not attn.only_cross_attention:
            key = torch.cat([key, split_heads(attn, attn.to_k(x))], 2)
            value = torch.cat([value, split_heads(attn, attn.to_v(x))], 2)
        out = attend(split_heads(attn, attn.to_q(x)), Tokens(key, value), self.product)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return hidden_states + out.transpose(1, 2).unflatten(-1, hidden_states.shape[2:])


OWN = (_Attend, _AttendJointly)
# One processor a layer for the life of a network: a compiled step finds the same objects in every run.
_processors: WeakKeyDictionary[nn.Module, dict[Product, dict[str, Any]]] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_locking = threading.Lock()


def _lock(net: nn.Module) -> Any:
    with _locking:
        return _locks.setdefault(net, threading.RLock())


@contextmanager
def locked(*nets: nn.Module) -> Iterator[None]:
    """Inside the block no other thread runs these networks, by a pipeline that shares them, or sets them otherwise."""
    with ExitStack() as stack:
        for net in sorted(nets, key=id):  # all threads in the same order: none waits for one that waits for it
            stack.enter_context(_lock(net))
        yield


@contextmanager
def installed(*nets: nn.Module, product: Product = F.scaled_dot_product_attention) -> Iterator[None]:
    """The executor's attention, by that product or by xformers', inside the block; afterwards every network has the
    processors that it had before."""
    with locked(*nets), ExitStack() as stack:
        for net in nets:
            layers = attention_layers(net)
            chosen = product_of(layers, product)
            own = _processors.setdefault(net, {}).setdefault(chosen, {})
            for name, layer in layers if not own else ():
                own[name] = (_AttendJointly if joint(layer) else _Attend)(name, chosen)
            for name, layer in layers:
                stack.callback(setattr, layer, "processor", layer.processor)
                layer.processor = own[name]
        yield


def changed(net: Net) -> str | None:
    """What was done to a network so that only its own forward is sure to respect it; None if nothing."""
    if hasattr(net, "_orig_mod") or getattr(net, "_compiled_call_impl", None):
        return "it was compiled by the caller"
    if (name := replaced(net)) is not None:
        return f"its {name} was replaced"
    if hasattr(net, "_diffusers_hook") or net._forward_hooks or net._forward_pre_hooks:
        return "it has hooks of its own"
    return None
