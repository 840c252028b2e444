"""What executes a step, or the networks in it.

An engine is given a step and answers with a function of the same tensors. Most leave the step's own arithmetic to torch and
replace its networks only: pure functions of tensors, equal for equal networks, that say which modules they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree
from diffusion_kit.sampling.step import Step

StepFunction = Callable[[Tensor, Tensor, Tree], tuple[Tensor, Tensor, *tuple[Tree, ...]]]


class Network(Protocol):
    """A hashable pure function of trees of tensors: a denoiser, an injection, a part of an autoencoder, a text encoder."""

    @property
    def executed(self) -> tuple[nn.Module, ...]: ...

    def __call__(self, *inputs: Tree) -> Tree: ...


class Engine:
    """Runs everything as it is. Others replace what they do better.

    Attributes:
        name: what `explain()` and the command line call it.
        notes: what it did otherwise than it was asked, a line each; a `listener` is told of each at once.
        attention: of the signature of torch's scaled_dot_product_attention.
        runtime: what it calls itself in a note.
        only_steps: it runs whole steps, and leaves networks outside them as they are.
        copies: it has a copy of the weights for every set of inputs, so that a network should have the same in every step.
    """

    name = "eager"
    runtime = ""  # its name
    attention: Callable[..., Tensor] = staticmethod(F.scaled_dot_product_attention)
    only_steps = False
    copies = False

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.listener: Callable[[str], None] | None = None

    def renew(self) -> None:
        """Before a pipeline's call: forgets what was made of weights that have changed since the last one."""

    def begin(self, nets: Iterable[nn.Module]) -> None:
        """Before a run of the loop that executes these modules, set as they are in it."""

    def end(self) -> None:
        """After the run."""

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        """What runs in place of a step."""
        return step

    def network(self, network: Any) -> Any:
        """What runs in place of a `Network`."""
        return network

    def cannot(self, what: str, error: Exception) -> None:
        """Notes that something runs as it is, and the first line of why."""
        told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        self.note(f"{what} runs as it is, {self.runtime or self.name} cannot: {told[0].strip()[:200]}")

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            if self.listener is not None:
                self.listener(line)


eager = Engine()
