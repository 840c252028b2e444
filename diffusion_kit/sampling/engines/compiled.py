"""A whole step, compiled once for each signature."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction
from .recent import Recent
from .weights import settings

GRAPHS = 32  # that are kept


class Graphs(Engine):
    """Engines that have a graph for each signature: the step, the shapes of its tensors, and what is set on its modules,
    which is a constant of the graph. A subclass gives `make`. What it cannot make runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: Recent[StepFunction] = Recent(GRAPHS)
        self.settings: dict[nn.Module, Hashable] = {}

    def begin(self, nets: Iterable[nn.Module]) -> None:
        self.settings = {net: settings(net) for net in nets}

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        if step.own_forward:
            self.note(f"eager: {self.name} leaves networks that run through their own forward as they are")
            return step
        signature = (step, shapes(state), shapes(tensors), tuple(self.settings.get(net) for net in step.executed))
        return self.graphs.get(signature, lambda: self.make(step, state, tensors))

    def make(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        raise TypeError(f"{type(self).__name__} makes nothing")

    def cannot(self, error: Exception) -> None:
        told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        self.note(f"a step runs as it is, {self.name} cannot: {told[0].strip()[:200]}")


class Compiled(Graphs):
    """torch.compile of one whole step.

    Prompts, scales, masks and windows are tensors or choose between signatures, so a signature seen before compiles
    nothing.
    """

    name = "inductor"

    def __init__(self, **options: Any):
        """`options` are those of torch.compile (`backend`, `mode`)."""
        super().__init__()
        self.options, self.numbers = options, count()

    def make(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        def run(state: Tensor, call: Tensor, tensors: Tree) -> tuple[Tensor, Tensor, *tuple[Tree, ...]]:
            return step(state, call, tensors)

        # A code object of its own: dynamo keeps its cache, and the limit of recompilations, by code object.
        run.__code__ = run.__code__.replace(co_name=f"step_{next(self.numbers)}")
        return CompiledStep(step, torch.compile(run, fullgraph=True, dynamic=False, **self.options), self)


class CompiledStep:
    """It is compiled when it is called first; where that fails, the step runs as it is from then on."""

    def __init__(self, step: Step, compiled: StepFunction, engine: Compiled) -> None:
        self.step, self.run, self.engine = step, compiled, engine

    def __call__(self, state: Tensor, call: Tensor, tensors: Tree) -> tuple[Tensor, Tensor, *tuple[Tree, ...]]:
        try:
            return self.run(state, call, tensors)
        except Exception as error:  # a compiler may raise anything
            if self.run is self.step:
                raise
            self.engine.cannot(error)
            self.run = self.step
        return self.step(state, call, tensors)
