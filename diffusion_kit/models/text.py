"""Prompts to text states, with CLIP's tokenizers and encoders as SDXL uses them.

The plain way cuts a prompt after the tokenizer's length (77 tokens). `weighted=True` reads prompts of any length, in
windows of that length whose states stand one after the other, and weights:

    (a red fox)     1.1 times          (a red fox:1.4)   1.4 times         [a red fox]   1 / 1.1 times
    ((nested))      1.1 x 1.1 times    \\( \\) \\[ \\]      the characters themselves

A weight w moves the state of each token from that of an empty prompt: empty + w (state - empty).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from diffusion_kit.sampling.engines import Engine, eager

STEP = 1.1  # weight of one bracket
_PIECES = re.compile(r"\\([()\[\]\\])|\(|\[|:\s*([+-]?\d*\.?\d+)\s*\)|\)|\]|[^\\()\[\]:]+|:|\\")


class Text(NamedTuple):
    """states (B, tokens, width) and, of an encoder with a projection, pooled (B, P)."""

    states: Tensor
    pooled: Tensor | None


class Layer(NamedTuple):
    """Whose states are taken: the layer `back` from the end (0 is the last), through the encoder's last norm or not."""

    back: int
    normed: bool


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Any,
    encoder: Any,
    layer: Layer,
    *,
    windows: int | None = None,
    length: int | None = None,
    engine: Engine = eager,
) -> Text:
    """Prompts with weights in `windows` windows; or, where that is None, as they are, cut to `length` tokens."""
    if windows is None:
        return encode_text(prompts, tokenizer, encoder, layer, length=length, engine=engine)
    return encode_weighted(prompts, tokenizer, encoder, layer, windows=windows, engine=engine)


def encode_text(
    prompts: Sequence[str],
    tokenizer: Any,
    encoder: Any,
    layer: Layer,
    *,
    length: int | None = None,
    engine: Engine = eager,
) -> Text:
    length = length or tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    _warn_of_cut(prompts, tokenizer, tokens.input_ids)
    sees_mask = getattr(encoder.config, "use_attention_mask", False)
    network = engine.network(TextEncoder(encoder, layer))
    return network(*_on_device(encoder, tokens.input_ids, tokens.attention_mask if sees_mask else None))


def encode_weighted(
    prompts: Sequence[str],
    tokenizer: Any,
    encoder: Any,
    layer: Layer,
    *,
    windows: int | None = None,
    engine: Engine = eager,
) -> Text:
    """States of prompts of any length with weights; see the module's text. `windows` is the least number of windows."""
    room = tokenizer.model_max_length - 2
    tokens = [_weighted_tokens(prompt, tokenizer) for prompt in prompts]
    n = max([windows or 1, *(-(-len(own) // room) for own in tokens)])
    empty = tokenizer("", padding="max_length", max_length=room + 2, return_tensors="pt").input_ids
    network = engine.network(TextEncoder(encoder, layer))
    neutral = network(*_on_device(encoder, empty, None)).states
    rows, pooled = [], []
    for own in tokens:
        parts = []
        for k in range(n):
            part = own[k * room : (k + 1) * room]
            ids, weights = empty.clone(), torch.ones(room + 2)
            ids[0, 1 : 1 + len(part)] = torch.tensor([token for token, _ in part], dtype=ids.dtype)
            if len(part) < room + 1:
                ids[0, 1 + len(part)] = tokenizer.eos_token_id
            weights[1 : 1 + len(part)] = torch.tensor([weight for _, weight in part])
            text = network(*_on_device(encoder, ids, None))
            parts.append(neutral + weights.to(neutral)[None, :, None] * (text.states - neutral))
            if k == 0:
                pooled.append(text.pooled)
        rows.append(torch.cat(parts, 1))
    firsts = [own for own in pooled if own is not None]
    return Text(torch.cat(rows), torch.cat(firsts) if firsts else None)


def count_windows(prompts: Sequence[str], tokenizer: Any) -> int:
    room = tokenizer.model_max_length - 2
    return max(1, *(-(-len(_weighted_tokens(prompt, tokenizer)) // room) for prompt in prompts))


@dataclass(frozen=True)
class TextEncoder:
    """An encoder of CLIP's kind, as engines take it."""

    encoder: Any
    layer: Layer

    @property
    def executed(self) -> tuple[Any, ...]:
        return (self.encoder,)

    def __call__(self, ids: Tensor, mask: Tensor | None) -> Text:
        """Of tokens (B, n), and which of them are seen, (B, n)."""
        out = self.encoder(ids, mask, output_hidden_states=True)
        states = out.hidden_states[-(self.layer.back + 1)]
        if self.layer.normed:
            states = getattr(self.encoder, "text_model", self.encoder).final_layer_norm(states)
        return Text(states, out[0] if out[0].ndim == 2 else None)


def _on_device(encoder: Any, *values: Tensor | None) -> list[Tensor | None]:
    device = get_module_execution_device(encoder)
    return [None if value is None else value.to(device) for value in values]


def _warn_of_cut(prompts: Sequence[str], tokenizer: Any, ids: Tensor) -> None:
    for prompt in prompts:
        whole = tokenizer(prompt).input_ids
        if len(whole) > ids.shape[1]:
            lost = tokenizer.decode(whole[ids.shape[1] - 1 : -1])
            warnings.warn(f"the prompt was cut after {ids.shape[1]} tokens; lost: {lost!r}", stacklevel=5)


def _weighted_tokens(prompt: str, tokenizer: Any) -> list[tuple[int, float]]:
    return [
        (token, weight)
        for text, weight in parse_weights(prompt)
        for token in tokenizer(text, add_special_tokens=False).input_ids
    ]


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Pieces of a prompt and the weight of each. Brackets that are not closed count to the end.

    >>> parse_weights("a (red:1.5) fox")
    [('a ', 1.0), ('red', 1.5), (' fox', 1.0)]
    """
    pieces: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def scale_from(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PIECES.finditer(prompt):
        piece, escaped, weight = match[0], match[1], match[2]
        if escaped:
            pieces.append((escaped, 1.0))
        elif piece == "(":
            open_round.append(len(pieces))
        elif piece == "[":
            open_square.append(len(pieces))
        elif weight is not None and open_round:
            scale_from(open_round.pop(), float(weight))
        elif piece == ")" and open_round:
            scale_from(open_round.pop(), STEP)
        elif piece == "]" and open_square:
            scale_from(open_square.pop(), 1 / STEP)
        else:
            pieces.append((piece, 1.0))
    for start in open_round:
        scale_from(start, STEP)
    for start in open_square:
        scale_from(start, 1 / STEP)
    return pieces
