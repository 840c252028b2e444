"""A step captured once as a CUDA graph and replayed: the kernels of a whole step for the price of one launch.

A graph reads and writes fixed memory. So each signature of a step (the step itself, and the shapes of its tensors) has
buffers: what differs from what was given last is copied into them, the graph is replayed, and copies of what it wrote are
handed out. A window of a control is two graphs. Weights are read where they lie: edits in place act at once, and where a
weight has moved the graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree
from diffusion_kit.sampling.step import Step

from .engine import StepFunction
from .exported import current, filled, leaves, version
from .graphs import Graphs
from .weights import places

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels and take their workspaces


class Capture(Protocol):
    def __call__(self, function: Callable[[], Tree], device: torch.device) -> tuple[Tree, Callable[[], None]]:
        """What the function gives, and what computes it anew in the same place, from the memory that the function read, all
        of it on the device."""


class OnCuda:
    """Captures on the current card: all graphs of a card on one stream, in one pool of memory. (torch's own stream for
    captures is of the card that captured first.)"""

    def __init__(self) -> None:
        self.places: dict[int, tuple[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"places": {}}

    def __call__(self, function: Callable[[], Tree], device: torch.device) -> tuple[Tree, Callable[[], None]]:
        if device.type != "cuda":  # a graph of nothing
            raise RuntimeError(f"it is for CUDA, the step is on {device}")
        card = torch.cuda.current_device()
        if card not in self.places:
            self.places[card] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream, pool = self.places[card]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
        return outputs, graph.replay


class CudaGraphs(Graphs):
    name = "cudagraph"

    def __init__(self, capture: Capture | None = None) -> None:
        super().__init__()
        self.capture = capture or OnCuda()

    def make(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        call = torch.zeros(1, dtype=torch.long, device=state.device)
        return self.captured(step, (state, call, tensors), "a step")

    def captured(self, function: Any, inputs: tuple[Tree, ...], what: str) -> Any:
        """A graph of a function of such inputs, or the function where it cannot be captured."""
        try:
            return Captured(function, inputs, self.capture)
        except Exception as error:  # out of memory, or an operation that no graph holds
            self.cannot(what, error)
            return function

    def renew(self) -> None:
        """Forgets graphs that read weights where they are no more, and steps that could not be captured."""
        for key, graph in list(self.graphs.values.items()):
            if not isinstance(graph, Captured) or graph.places != places(graph.function.executed):
                del self.graphs.values[key]


class Captured:
    """One graph of a function, and its buffers."""

    def __init__(self, function: Any, inputs: tuple[Tree, ...], capture: Capture) -> None:
        self.function, self.places = function, places(function.executed)
        self.given = leaves(inputs)
        self.device = self.given[0].device
        self.versions = [version(value) for value in self.given]
        with torch.inference_mode(False):  # else nobody outside of it could write to them
            self.buffers = [value.clone(memory_format=torch.preserve_format) for value in self.given]
        own = filled(inputs, self.buffers)
        with current(self.device):
            self.outputs, self.replay = capture(lambda: function(*own), self.device)

    def __call__(self, *inputs: Tree) -> Any:
        with current(self.device):
            for k, value in enumerate(leaves(inputs)):
                now = version(value)
                if value is not self.given[k] or now != self.versions[k]:
                    self.buffers[k].copy_(value)
                    self.given[k], self.versions[k] = value, now
            self.replay()
            return filled(self.outputs, [value.clone() for value in leaves(self.outputs)])
