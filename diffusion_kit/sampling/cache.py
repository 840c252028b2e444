"""A step cache: what the deep blocks of a UNet give changes slowly from step to step (Ma et al. 2023, DeepCache, arXiv
2312.00858), so a full step keeps it, and the steps that follow run only the shallow blocks. They run over what it will be
if it goes on as between the last two full steps (Liu et al. 2025, TaylorSeer, arXiv 2503.06923, first order)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .doors import Answer, Tree
from .engines.exported import filled, leaves

FORECAST = (
    0.75  # of the change between two full steps that is expected of the next; 1 overshoots, see docs/step-cache.md
)


@dataclass(frozen=True)
class Repeat:
    """A control that answers what it is given: what all controls together answered in the last full step, or silence."""

    executed = ()

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        return tensors


class Kept(NamedTuple):
    """What a full step leaves.

    Attributes:
        deep: (branches x B, C, h, w), what the deep blocks gave. answer: of all controls together.
        offset: (B, C, H, W), what guidance added to the conditional prediction; None without guidance.
    """

    deep: Tensor
    answer: Answer
    offset: Tensor | None = None

    def last(self, rows: int) -> Kept:
        """Of the conditional branch alone."""

        def conditional(value: Tensor) -> Tensor:
            return value[-rows:] if value.ndim and len(value) > rows else value

        answer = filled(self.answer, map(conditional, leaves(self.answer)))
        return Kept(self.deep[-rows:], answer, self.offset)


@dataclass
class StepCache:
    """What is kept in one run, and for how long.

    Attributes:
        every: one step in so many is full.
        depth: down blocks, and as many up blocks, that run in every step.
        controls: in the other steps "reuse" answers, so that no ControlNet runs there; or "recompute" them.
        guidance: in the other steps "reuse" what guidance adds, so that one branch runs there; or "recompute" it.

    Raises:
        ValueError: a value out of its range.
    """

    every: int = 3
    depth: int = 1
    controls: Literal["reuse", "recompute"] = "reuse"
    guidance: Literal["reuse", "recompute"] = "recompute"
    _key: Hashable = field(default=None, init=False)
    _history: list[tuple[int, Kept]] = field(default_factory=list, init=False)  # the last two full steps
    _full: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"step cache every is {self.every}; it must be 1 or more")
        for name in ("controls", "guidance"):
            if getattr(self, name) not in ("reuse", "recompute"):
                raise ValueError(f"step cache {name} is {getattr(self, name)!r}; it must be 'reuse' or 'recompute'")

    def __str__(self) -> str:
        return f"every {self.every} steps, depth {self.depth}, controls: {self.controls}, guidance: {self.guidance}"

    def recall(self, step: int, key: Hashable, rows: int) -> Kept | None:
        """What a sampling step of B = `rows` pictures goes on with, or None if it has to be a full one.

        With an offset it is for the conditional branch alone.

        All calls of a full step are full. `key` says in which branches and with which controls the step runs: what was kept
        under another is not used.
        """
        if self._history and key == self._key and self._history[-1][0] < step < self._history[-1][0] + self.every:
            kept = self._forecast(step)
            return (
                kept.last(rows) if self.guidance == "reuse" and kept.offset is not None else kept._replace(offset=None)
            )
        if key != self._key:
            self.forget()
        self._key, self._full = key, step
        return None

    def keep(self, *kept: Any) -> None:
        """What a call of the full step at hand gave."""
        before = [own for own in self._history if own[0] != self._full]
        self._history = [*before[-1:], (self._full, Kept(*kept))]

    def forget(self) -> None:
        self._history = []

    def _forecast(self, step: int) -> Kept:
        last, now = self._history[-1]
        if len(self._history) < 2:
            return now
        first, before = self._history[0]
        share = FORECAST * (step - last) / (last - first)

        def ahead(a: Tensor, b: Tensor) -> Tensor:
            return b + share * (b - a)

        offset = None if before.offset is None or now.offset is None else ahead(before.offset, now.offset)
        return Kept(ahead(before.deep, now.deep), _each(ahead, before.answer, now.answer), offset)


def _each(change: Any, *answers: Answer) -> Answer:
    """An answer of what `change` makes of the residuals; tokens and channels, which stay, are those of the last."""
    intra, skips = (
        tuple(change(*values) for values in zip(*(getattr(own, name) for own in answers), strict=True))
        for name in ("intra", "skips")
    )
    mids = [own.mid for own in answers]
    mid = None if any(value is None for value in mids) else change(*mids)
    return answers[-1]._replace(intra=intra, skips=skips, mid=mid)
