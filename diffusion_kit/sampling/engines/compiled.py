"""A whole step, compiled once for each signature."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction


class Compiled(Engine):
    """torch.compile of one whole step, one graph for each signature (the step, and the shapes of its tensors).

    Prompts, scales, masks and windows are tensors or choose between signatures, so a signature seen before compiles
    nothing. A step that the compiler cannot take whole is an error, not a silent break.
    """

    name = "inductor"

    def __init__(self, **options: Any):
        """`options` are those of torch.compile (`backend`, `mode`)."""
        super().__init__()
        self.options = options
        self.graphs: dict[Hashable, StepFunction] = {}

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        signature = (step, shapes(state), shapes(tensors))
        if signature not in self.graphs:
            self.graphs[signature] = self._compile(step)
        return self.graphs[signature]

    def _compile(self, step: Step) -> StepFunction:
        def run(state: Tensor, call: Tensor, tensors: Tree) -> tuple[Tensor, Tensor, *tuple[Tree, ...]]:
            return step(state, call, tensors)

        # A code object of its own: dynamo keeps its cache, and the limit of recompilations, by code object.
        run.__code__ = run.__code__.replace(co_name=f"step_{len(self.graphs)}")
        return torch.compile(run, fullgraph=True, dynamic=False, **self.options)
