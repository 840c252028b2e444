"""A whole step, compiled once for each signature."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree
from diffusion_kit.sampling.step import Step

from .engine import StepFunction
from .graphs import Graphs


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
            self.engine.cannot("a step", error)
            self.run = self.step
        return self.step(state, call, tensors)
