"""Engines that run a whole step as one graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction
from .recent import Recent
from .weights import meddled, settings

GRAPHS = 32  # that are kept
RUNS = 4  # the last ones, whose networks have graphs


class Graphs(Engine, ABC):
    """Engines that have a graph for each signature: the step, the shapes of its tensors, and what is set on its modules,
    which is a constant of the graph. A step without a graph runs as it is."""

    only_steps = True

    def __init__(self) -> None:
        super().__init__()
        self.graphs: Recent[StepFunction] = Recent(GRAPHS)
        self.runs: deque[set[nn.Module]] = deque(maxlen=RUNS)
        self.settings: dict[nn.Module, int] = {}
        self.meddled: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the engine has no graphs, which are of networks that it will not run."""
        return vars(self) | {"graphs": Recent(GRAPHS), "runs": deque(maxlen=RUNS), "settings": {}}

    def begin(self, nets: Iterable[nn.Module]) -> None:
        self.settings = {net: hash(settings(net)) for net in nets}
        self.meddled = meddled(self.settings)
        self.runs.append(set(self.settings))
        used: set[nn.Module] = set().union(*self.runs)
        self.graphs.forget(lambda signature: not used.issuperset(signature[0].executed))  # nor need they be in memory

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        if step.own_forward:
            self.note(f"eager: {self.name} leaves networks that run through their own forward as they are")
            return step
        if self.meddled is not None:
            self.cannot("a step", RuntimeError(self.meddled))
            return step
        signature = (step, shapes(state), shapes(tensors), tuple(self.settings.get(net) for net in step.executed))
        return self.graphs.get(signature, lambda: self.make(step, state, tensors))

    @abstractmethod
    def make(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        """A graph of the step for such tensors, or the step where there can be none."""
