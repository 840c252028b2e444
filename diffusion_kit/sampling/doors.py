"""The four doors through which a condition enters the denoiser.

* tokens: `Conditioning`, the tensors that the denoiser prepares once (text states, pooled and size embeddings), and what
  controls let attention see beside them;
* channels: a tensor (rows, C, H, W) concatenated to the model input, of the task or of a control;
* residuals: tensors added inside the network;
* latents: a `LatentRule`, applied to the latents after each step.

What controls send through the first three in the step at hand is the `Answer` of their `Injection`.

A step runs in `branches`: one without guidance; two with it, (unconditional, conditional) along the batch; one more for
a control that has a guidance of its own.

All that varies from run to run is a tree of tensors, all that is fixed is a hashable value: so one step is a function
of tensors whose signature (`step.Step`) says which graph it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Prediction = tuple[Tensor, Tensor | None, *tuple[Any, ...]]
Tree = Any  # a tensor, or a tuple, list or dict of trees
TABLES = ("emb", "timesteps")  # in what a network is given: tensors that have a row for each call
Conditioning = Mapping[str, Tensor]  # named tensors; the conditional half comes last along the batch


class Answer(NamedTuple):
    """What enters a UNet in one step beside the model input.

    Attributes:
        intra: one tensor (rows, C_k, h, w) for each down block, added inside it, and for the middle after them.
        skips: one tensor for each skip connection, from conv_in to the last block, added to it.
        mid: added after the middle block.
        tokens: by the name of an attention layer, what its queries see beside the text.
        channels: (rows, C, H, W), where the network takes more than the latents.
    """

    intra: tuple[Tensor, ...] = ()
    skips: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    tokens: Mapping[str, tuple[Tree, ...]] = {}
    channels: Tensor | None = None


def add_answers(first: Answer, second: Answer) -> Answer:
    """Sum of two answers; a missing tensor counts as zero. Tokens stand side by side."""
    names = {**first.tokens, **second.tokens}
    return Answer(
        _add_each(first.intra, second.intra),
        _add_each(first.skips, second.skips),
        _add(first.mid, second.mid),
        {name: (*first.tokens.get(name, ()), *second.tokens.get(name, ())) for name in names},
        _add(first.channels, second.channels),
    )


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _add_each(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    shared = tuple(a + b for a, b in zip(first, second, strict=False))
    return shared + first[len(shared) :] + second[len(shared) :]


class Injection(Protocol):
    """How a control answers within a step: a pure function of tensors, equal for equal networks and modes.

    `executed` are the networks that run in it, but for those that run through their own forward.
    """

    @property
    def executed(self) -> tuple[Any, ...]: ...

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        """For the model input x (branches x rows, C, H, W)."""


class Encoded(Protocol):
    """A control after its one encoding, for one run.

    `guidance` is the scale of a guidance of its own, where it has one: in a guided step the first branch then goes without
    this control, the second with it and without the prompt (Brooks et al. 2023, arXiv 2211.09800, eq. 3). `name` is to be
    read.
    """

    name: str
    injection: Injection
    guidance: float | None

    def active(self, step: int, steps: int) -> bool: ...

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        """What the injection takes: fixed while the conditioning is."""

    def silence(self, branches: int) -> Answer:
        """Zeros of the shapes that its answers have, as far as that can be."""


class Denoiser(Protocol):
    """A network behind one signature, whatever its family. Equal for equal networks; `executed` as of an `Injection`."""

    @property
    def executed(self) -> tuple[Any, ...]: ...

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        """All that does not change from step to step: embeddings of every timestep, keys and values of the text. A call is
        given it with the row of its own of each of the `TABLES`."""

    def __call__(self, tensors: Tree, x: Tensor, answer: Answer) -> Prediction:
        """(prediction, variance or None), each (rows, C, H, W); behind them what a step cache is to keep."""


class LatentRule(Protocol):
    def __call__(self, tensors: Tree, latents: Tensor, call: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class KeepUnmasked:
    """Inpainting with a plain UNet: outside the mask the latents are the given image at the next noise level."""

    def __call__(self, tensors: Tree, latents: Tensor, call: Tensor) -> Tensor:
        """(1 - mask) (a image + b noise) + mask latents; a and b of the call that follows."""
        a, b = pick(tensors["noise_level"], call + 1)[0].unbind(-1)
        image = a * tensors["image"] + b * tensors["noise"]
        return image + tensors["mask"] * (latents - image)


def pick(table: Tensor, call: Tensor) -> Tensor:
    """Row of a table on the device for the call index, a tensor (1,) on the device: no host read. Keeps the axis."""
    return table.index_select(0, call)


def at(tensors: Tree, call: Tensor) -> Tree:
    """What a network is given, in one call: of a table the call's row."""
    if not isinstance(tensors, Mapping):
        return tensors
    return {name: pick(value, call)[0] if name in TABLES else value for name, value in tensors.items()}


def at_once(tensors: Tree) -> Tree:
    """The same of a schedule that has one call."""
    return {name: value[0] if name in TABLES else value for name, value in tensors.items()}


def inside(step: int, steps: int, window: tuple[float, float]) -> bool:
    """Whether a sampling step lies in a window of fractions of the run."""
    start, end = window
    return start <= step / steps and (step + 1) / steps <= end


def conditional(tree: Tree, rows: int) -> Tree:
    """The last `rows` entries along the batch of every tensor of a mapping: the conditional branch."""
    return {name: value[-rows:] for name, value in tree.items()}


def branched(tree: Tree, rows: int, branches: int) -> Tree:
    """Tensors of (unconditional, conditional) along the batch for so many branches, of which the last is conditional."""
    if branches == 1:
        return conditional(tree, rows)
    if branches == 2:
        return tree
    return {name: torch.cat([value[:rows]] * (branches - 1) + [value[rows:]]) for name, value in tree.items()}


def in_every(values: Tensor, branches: int) -> Tensor:
    """Rows (B, ...) again in every branch."""
    return values if branches == 1 else torch.cat([values] * branches)


def spread(values: Tensor, prompts: int, per_prompt: int, what: str) -> Tensor:
    """One entry for each picture: entry k belongs to prompt k and to all of that prompt's pictures.

    Args:
        values: (1, ...), (prompts, ...) or (prompts x per_prompt, ...).

    Raises:
        ValueError: any other number of entries.
    """
    n = values.shape[0]
    if n == 1:
        return values.expand(prompts * per_prompt, *values.shape[1:])
    if n == prompts:
        return values.repeat_interleave(per_prompt, 0)
    if n == prompts * per_prompt:
        return values
    counts = " or ".join(str(count) for count in sorted({1, prompts, prompts * per_prompt}))
    raise ValueError(f"{n} entries of {what} for {prompts} prompts: give {counts}")


def shapes(tree: Tree) -> Hashable:
    """Shapes, types and devices of every tensor in a tree: with the step itself, the signature of a compiled graph."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape), tree.dtype, tree.device)
    if isinstance(tree, Mapping):
        return tuple((name, shapes(value)) for name, value in tree.items())
    if isinstance(tree, Sequence):
        return tuple(shapes(value) for value in tree)
    return tree
