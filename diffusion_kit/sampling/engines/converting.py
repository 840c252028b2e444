"""Engines that convert each network once for the shapes of what it is given, and keep what they made on disk.

Keys and values of the text and residuals of controls are inputs. What cannot be converted runs as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction
from .exported import Flat, leaves, plain
from .files import whole_folder
from .pages import forget
from .weights import content, meddled, park, sampled, state

PACKAGES = ("torch", "diffusers", "transformers", "peft", "diffusion_kit")  # on whose versions a conversion depends


class Converting(Engine, ABC):
    """
    Args:
        folder: where converted networks are kept.
        parks: weights of converted networks lie in a file meanwhile (see `weights.park`).
    """

    copies = True
    packages: ClassVar[tuple[str, ...]] = PACKAGES

    def __init__(self, folder: Path, *, parks: bool = True) -> None:
        super().__init__()
        self.folder, self.parks = folder, parks
        self.made: dict[Any, Made] = {}
        self.used: set[Hashable] = set()
        self.seen: set[Hashable] | None = None  # in a run of the loop, those whose weights were looked at

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the engine finds on disk what this one has converted."""
        return vars(self) | {"made": {}, "used": set(), "seen": None}

    @abstractmethod
    def convert(self, flat: Flat, example: tuple[Tensor, ...], new: Path) -> None:
        """Writes the converted network into the new folder."""

    @abstractmethod
    def load(self, folder: Path, network: Any, inputs: Tree) -> Any:
        """A function of trees of tensors, as the network is one."""

    def machine(self, device: torch.device) -> str:
        """What of the machine, or of a card, is in a converted network."""
        return ""

    def renew(self) -> None:
        self.used = set()
        self.made = {key: own for key, own in self.made.items() if own.bits == sampled(key[0].executed)}

    def begin(self, nets: Iterable[nn.Module]) -> None:
        self.seen = set()

    def end(self) -> None:
        self.seen = None

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        injections = tuple(self.network(own) for own in step.injections)
        return replace(step, denoiser=self.network(step.denoiser), injections=injections)

    def network(self, network: Any) -> Any:
        return Converted(network, self) if network.executed else network

    def run(self, network: Any, inputs: tuple[Tree, ...]) -> Tree:
        """What the network makes of the inputs, by the runtime where that can be. Weights are looked at once in a run of
        the loop: a look takes as long as a step of a small network."""
        key = self._key(network, inputs)
        if self.seen is not None and key in self.seen:
            runner = self.made[key].runner
        elif (why := meddled(network.executed)) is not None:
            self.cannot(type(network).__name__, RuntimeError(why))
            return network(*inputs)
        else:
            runner = self.runner(network, key, inputs)
            if self.seen is not None:
                self.seen.add(key)
        try:
            return runner(*inputs)
        except Exception as error:  # a runtime may raise anything
            if runner == network:
                raise
            self.cannot(type(network).__name__, error)
            self.made[key] = self._known(network, network)
            return network(*inputs)

    def runner(self, network: Any, key: Hashable, inputs: Tree) -> Any:
        """The network as the runtime runs it for inputs of these shapes, or as it is where that cannot be."""
        self.used.add(key)
        known = self.made.get(key)
        if known is None or known.state != state(network.executed):
            # A call needs the memory of what it uses; what was made for another size is on disk.
            self.made = {k: own for k, own in self.made.items() if k in self.used and k != key}
            known = self.made[key] = self._known(self._make(network, inputs), network)
        return known.runner

    def _key(self, network: Any, inputs: Tree) -> Hashable:
        return network, shapes(inputs), torch.get_num_threads()

    def _known(self, runner: Any, network: Any) -> Made:
        return Made(runner, state(network.executed), sampled(network.executed))

    def _make(self, network: Any, inputs: Tree) -> Any:
        try:
            folder = self._converted(network, inputs)
            if self.parks:  # before there is a second copy
                park(network.executed, self.folder)
                forget(network.executed)
            runner = self.load(folder, network, inputs)
        except Exception as error:  # a converter may raise anything
            self.cannot(type(network).__name__, error)
            return network
        return runner

    def _converted(self, network: Any, inputs: Tree) -> Path:
        """The folder of the converted network, made where it is not there."""
        versions = [importlib.metadata.version(name) for name in self.packages]
        device = leaves(inputs)[0].device
        about = f"{versions}{self.machine(device)}{network}{shapes(inputs)}{content(network.executed)}"
        folder = self.folder / f"{self.name}-{hashlib.sha256(about.encode()).hexdigest()[:32]}"
        with whole_folder(folder) as new:
            if new is not None:
                with torch.no_grad():
                    self.convert(Flat(network, inputs).eval(), tuple(map(plain, leaves(inputs))), new)
        return folder


class Made(NamedTuple):
    """What runs in place of a network, and the weights of which it was made."""

    runner: Any
    state: Hashable
    bits: list[int]


@dataclass(frozen=True)
class Converted:
    """Stands for a network: for what its engine makes of it when it is called."""

    network: Any
    engine: Converting

    @property
    def executed(self) -> tuple[nn.Module, ...]:
        return self.network.executed

    def __call__(self, *inputs: Tree) -> Tree:
        return self.engine.run(self.network, inputs)
