"""A step cache (Ma et al. 2023, DeepCache, arXiv 2312.00858): what the deep blocks of a UNet give changes slowly from
step to step, so a full step keeps it, and the steps that follow run only the shallow blocks over it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .doors import Answer, Tree


@dataclass(frozen=True)
class Repeat:
    """A control that answers what it is given: what all controls together answered in the last full step, or silence."""

    executed = ()

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        return tensors


@dataclass
class StepCache:
    """What is kept in one run, and for how long.

    Attributes:
        every: one step in so many is full.
        depth: down blocks, and as many up blocks, that run in every step.
        controls: "reuse" answers of the last full step, so that no ControlNet runs in the others; or "recompute" them.

    Raises:
        ValueError: a value out of its range.
    """

    every: int = 3
    depth: int = 1
    controls: Literal["reuse", "recompute"] = "reuse"
    _full: tuple[int, Hashable] = field(default=(0, None), init=False)
    _kept: tuple[Tensor, Answer] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"step cache every is {self.every}; it must be 1 or more")
        if self.controls not in ("reuse", "recompute"):
            raise ValueError(f"step cache controls is {self.controls!r}; it must be 'reuse' or 'recompute'")

    def __str__(self) -> str:
        return f"every {self.every} steps, depth {self.depth}, controls: {self.controls}"

    def recall(self, step: int, key: Hashable) -> tuple[Tensor, Answer] | None:
        """(deep features, answer of the controls) for a sampling step, or None if it has to be a full one.

        All calls of a full step are full. `key` says in which branches and with which controls the step runs: what was kept
        under another is not used.
        """
        full, known = self._full
        if self._kept is not None and key == known and full < step < full + self.every:
            return self._kept
        self._full = (step, key)
        return None

    def keep(self, deep: Tensor, answer: Answer) -> None:
        self._kept = (deep, answer)

    def forget(self) -> None:
        self._kept = None
