"""How the processes of a training hold its weights, and the step that they make together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Moments(NamedTuple):
    """An optimizer's state: tensors by "WEIGHT:KEY", each of the weight's shape or a number, and what JSON can write."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Parallel(ABC):
    """Every process calls every method at the same place: most of them wait for the others.

    Attributes:
        module: whose forward is the loss of a micro-batch.
        optimizer: whose groups have the learning rate.
        scheduled: whether the learning rate is set by another than the trainer.
        spread: whether no process can run the networks without the others.
    """

    module: nn.Module
    optimizer: Any
    scheduled = False
    spread = False

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch; after the last one of a step the gradients of all processes are averaged."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient."""

    @abstractmethod
    def update(self) -> bool:
        """Steps down the gradient, if it is finite; whether it was, or is to be with the next loss scale."""

    @abstractmethod
    def pieces(self) -> Mapping[str, Tensor]:
        """What this process holds of every trained weight, in float32: of any shape, perhaps nothing."""

    @abstractmethod
    def joined(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, of the processes' pieces."""

    @abstractmethod
    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's pieces of whole tensors."""

    def started(self) -> AbstractContextManager[None]:
        """While the target is begun, which may change weights before the first step."""
        return self.worn(None)

    @abstractmethod
    def worn(self, pieces: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Inside the block the target holds its weights whole, or those of pieces; afterwards its own again."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the target, whole."""

    @abstractmethod
    def moments(self) -> Moments:
        """The optimizer's state, whole."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        """What a checkpoint kept, of any number of processes and any way of sharing."""
