"""A step captured once as a CUDA graph and replayed: the kernels of a whole step for the price of one launch.

A graph reads and writes fixed memory. So each signature of a step (the step itself, and the shapes of its tensors) has
buffers: what differs from what was given last is copied into them, the graph is replayed, and copies of what it wrote are
handed out. A window of a control is two graphs. Weights are read where they lie: edits in place act at once, and where a
weight has moved the graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction
from .exported import filled, leaves, version
from .weights import places

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels and take their workspaces


class Capture(Protocol):
    def __call__(self, function: Callable[[], Tree]) -> tuple[Tree, Callable[[], None]]:
        """What the function gives, and what computes it anew in the same place, from the memory that the function read."""


class OnCuda:
    """Captures on the current device, all graphs in one pool of memory."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, function: Callable[[], Tree]) -> tuple[Tree, Callable[[], None]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = function()
        self.pool = graph.pool()
        return outputs, graph.replay


class CudaGraphs(Engine):
    name = "cudagraph"

    def __init__(self, capture: Capture | None = None) -> None:
        super().__init__()
        self.capture = capture or OnCuda()
        self.graphs: dict[Hashable, tuple[Hashable, Captured]] = {}

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        signature = (step, shapes(state), shapes(tensors))
        if signature not in self.graphs:
            call = torch.zeros(1, dtype=torch.long, device=state.device)
            self.graphs[signature] = places(step.executed), Captured(step, (state, call, tensors), self.capture)
        return self.graphs[signature][1]

    def renew(self) -> None:
        self.graphs = {key: own for key, own in self.graphs.items() if own[0] == places(key[0].executed)}  # type: ignore[index]


class Captured:
    """One graph and its buffers."""

    def __init__(self, step: Step, inputs: tuple[Tree, ...], capture: Capture) -> None:
        self.given = leaves(inputs)
        self.versions = [version(value) for value in self.given]
        self.buffers = [value.clone(memory_format=torch.preserve_format) for value in self.given]
        own = filled(inputs, self.buffers)
        self.outputs, self.replay = capture(lambda: step(*own))

    def __call__(self, *inputs: Tree) -> Any:
        for k, value in enumerate(leaves(inputs)):
            now = version(value)
            if value is not self.given[k] or now != self.versions[k]:
                self.buffers[k].copy_(value)
                self.given[k], self.versions[k] = value, now
        self.replay()
        return filled(self.outputs, [value.clone() for value in leaves(self.outputs)])
