"""In which order pictures come: a pure function of (seed, epoch, batch), so that a number says where a run is.

The batch of all processes is formed first, of pictures of one shape, and only then split; so the pictures of a step, and
what is drawn for each, do not depend on how many processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from diffusion_kit.training.keyed import Place

ORDER = 1_000_003  # keeps the order's stream from those of the draws


class Slot(NamedTuple):
    """A sample of a step: where it stands, which picture it is of, and how much it counts."""

    place: Place
    picture: int
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Order:
    """
    Args:
        shapes: of each picture, the number of its bucket.
        weights: how often each comes in an epoch; 1.5 is once and, by chance, once more.
        batch: pictures a step.
    """

    shapes: tuple[int, ...]
    weights: tuple[float, ...]
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("there is no picture to train on")

    def step(self, step: int) -> list[Slot]:
        """The samples of a step, counted from 0 through all epochs."""
        epoch, first = 0, 0
        while step - first >= (length := self.length(epoch)):
            first += length
            epoch += 1
        own, weight = self.epoch(epoch)[step - first]
        start = (step - first) * self.batch
        return [Slot(Place(self.seed, epoch, start + k), int(index), weight) for k, index in enumerate(own)]

    @cache  # noqa: B019  (an order lives as long as its run)
    def length(self, epoch: int) -> int:
        """Steps of an epoch."""
        return len(self.epoch(epoch))

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, epoch: int) -> list[tuple[np.ndarray, float]]:
        """Batches of an epoch, and how much the pictures of each count.

        The last of each shape is filled up with pictures of that shape, and counts as much as what it had before: a
        shape of one picture has a batch of its copies, and no more weight than any other picture.
        """
        rng = np.random.default_rng([self.seed, epoch, ORDER])
        weights = np.asarray(self.weights)
        times = np.floor(weights + rng.random(len(weights))).astype(int)
        drawn = rng.permutation(np.repeat(np.arange(len(weights)), times))
        if not len(drawn):
            drawn = np.array([int(rng.integers(len(weights)))])
        shapes = np.asarray(self.shapes)[drawn]
        batches: list[tuple[np.ndarray, float]] = []
        for shape in np.unique(shapes):
            own = drawn[shapes == shape]
            count = -(-len(own) // self.batch)
            rows = np.resize(own, count * self.batch).reshape(count, self.batch)
            rest = len(own) - (count - 1) * self.batch
            batches += zip(rows, [1.0] * (count - 1) + [rest / self.batch], strict=True)
        most = max(weight for _, weight in batches)  # 1, unless every shape has less than a batch
        return [(batches[k][0], batches[k][1] / most) for k in rng.permutation(len(batches))]


def share(batch: Sequence, rank: int, processes: int) -> Sequence:
    """The part of a batch that a process works on.

    Raises:
        ValueError: the batch cannot be split evenly.
    """
    if len(batch) % processes:
        raise ValueError(f"a batch of {len(batch)} cannot be split over {processes} processes: use a multiple of it")
    each = len(batch) // processes
    return batch[rank * each : (rank + 1) * each]
