"""Answers of networks that several calls ask the same: prompts and control pictures are encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from diffusion_kit.sampling.doors import Tree, shapes

from .engine import Engine, eager
from .exported import leaves
from .weights import content_of, elsewhere, meddling, sampled, state

LIMIT = 256 << 20  # bytes of answers


class Answers:
    """The last answers, up to `limit` bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.known = limit, OrderedDict[Hashable, Tree]()

    def get(self, key: Hashable, make: Callable[[], Tree]) -> Tree:
        if key not in self.known:
            self.known[key] = make()
        self.known.move_to_end(key)
        while len(self.known) > 1 and sum(map(_size, self.known.values())) > self.limit:
            self.known.popitem(last=False)
        return self.known[key]


class Remembered(Engine):
    """Lets another engine answer what was not asked before, of the same weights."""

    def __init__(self, answers: Answers, inner: Engine = eager) -> None:
        super().__init__()
        self.answers, self.inner, self.name = answers, inner, inner.name

    def note(self, line: str) -> None:
        if self.inner is not eager:  # that is everybody's
            self.inner.note(line)

    def network(self, network: Any) -> Any:
        run = self.inner.network(network)

        def ask(*inputs: Tree) -> Tree:
            nets = network.executed
            if elsewhere(nets):  # nobody knows of what weights
                return run(*inputs)
            weights = state(nets, moved=False), tuple(sampled(nets)), tuple(own for _, own in meddling(nets))
            key = (self.name, network, weights, shapes(inputs), _digest(inputs))
            return self.answers.get(key, lambda: run(*inputs))

        return ask


def _size(answer: Tree) -> int:
    return sum(value.nbytes for value in leaves(answer))


def _digest(inputs: Tree) -> bytes:
    digest = hashlib.sha256()
    for value in leaves(inputs):
        digest.update(content_of(value.cpu()))
    return digest.digest()
