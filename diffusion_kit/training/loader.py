"""The batches of one process, from any step on."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from .data.order import Order, Slot, share
from .data.samples import Batch, Pictures, collate
from .run import SIGNALS


@dataclass(frozen=True)
class Part:
    """A process among several, and how many of its pictures go through the network at once."""

    rank: int
    processes: int
    micro: int


@dataclass(frozen=True)
class MicroBatches:
    """Every sample, a list for each micro-batch, from step `first` to the end."""

    order: Order
    part: Part
    first: int
    steps: int

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in range(self.first, self.steps):
            own = share(self.order.step(step), self.part.rank, self.part.processes)
            for start in range(0, len(own), self.part.micro):
                yield list(own[start : start + self.part.micro])


def batches(pictures: Pictures, plan: MicroBatches, workers: int) -> Iterator[list[Batch]]:
    """The micro-batches of each step."""
    if workers:
        allow_open_files()
    loader: DataLoader[Any] = DataLoader(
        pictures,  # type: ignore[arg-type]
        batch_sampler=plan,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # its seed is of no consequence, but must not come from the global generator
    )
    each = plan.order.batch // plan.part.processes
    count = -(-each // plan.part.micro)
    step: list[Batch] = []
    for batch in loader:
        step.append(batch)
        if len(step) == count:
            yield step
            step = []


def allow_open_files() -> None:
    """Every tensor that a worker sends is a file until it is used: as many as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def end_with_parent() -> None:
    """Takes this process's SIGTERMs, as many as there come, until the one of the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def quiet_worker(_: int) -> None:
    """One thread each: the workers are the parallelism. What a terminal, a launcher or a cluster sends to all processes is
    the main process's to answer, which still wants its pictures: its own SIGTERM alone ends a worker."""
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
