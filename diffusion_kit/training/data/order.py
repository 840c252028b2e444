"""In which order pictures come: a pure function of (seed, epoch, batch), so that a number says where a run is.

The batch of all processes is formed first, of pictures of one shape, and only then split; so the pictures of a step, and
what is drawn for each, do not depend on how many processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from diffusion_kit.training.keyed import Place

ORDER = 1_000_003  # keeps the order's stream from those of the draws


@dataclass(frozen=True)
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

    def step(self, step: int) -> list[tuple[Place, int]]:
        """Place and picture of each sample of a step, counted from 0 through all epochs."""
        epoch, first = 0, 0
        while step - first >= (length := self.length(epoch)):
            first += length
            epoch += 1
        own = self.epoch(epoch)[step - first]
        start = (step - first) * self.batch
        return [(Place(self.seed, epoch, start + k), int(index)) for k, index in enumerate(own)]

    @cache  # noqa: B019  (an order lives as long as its run)
    def length(self, epoch: int) -> int:
        """Steps of an epoch."""
        return len(self.epoch(epoch))

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Batches of an epoch; the last of each shape is filled up with pictures that come first."""
        rng = np.random.default_rng([self.seed, epoch, ORDER])
        weights = np.asarray(self.weights)
        times = np.floor(weights + rng.random(len(weights))).astype(int)
        drawn = rng.permutation(np.repeat(np.arange(len(weights)), times))
        if not len(drawn):
            drawn = np.array([int(rng.integers(len(weights)))])
        shapes = np.asarray(self.shapes)[drawn]
        batches = []
        for shape in np.unique(shapes):
            own = drawn[shapes == shape]
            count = -(-len(own) // self.batch)
            batches += list(np.resize(own, count * self.batch).reshape(count, self.batch))
        return [batches[k] for k in rng.permutation(len(batches))]


def share(batch: Sequence, rank: int, processes: int) -> Sequence:
    """The part of a batch that a process works on.

    Raises:
        ValueError: the batch cannot be split evenly.
    """
    if len(batch) % processes:
        raise ValueError(f"a batch of {len(batch)} cannot be split over {processes} processes: use a multiple of it")
    each = len(batch) // processes
    return batch[rank * each : (rank + 1) * each]
