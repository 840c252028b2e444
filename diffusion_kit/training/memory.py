"""How many pictures fit, and what to do when they do not."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import Config
from .data.samples import Batch
from .launching import machine
from .loader import MicroBatches, batches
from .loop import Trainer

LARGEST = 256  # pictures at once
SHARE = 0.8  # of the free memory that may be used
WORTH = 1.05  # a doubled batch must make so many times the pictures a second


@dataclass(frozen=True)
class Trial:
    """A step of `size` pictures: bytes at its peak, seconds."""

    size: int
    memory: int
    seconds: float


def fitting_batch(trainer: Trainer, say: Callable[[str], None]) -> int:
    """The largest micro-batch that fits into memory and is worth it, found by doubling; the weights stay as they are."""
    best = 1
    trials: list[Trial] = []
    while (size := 2 ** len(trials)) <= LARGEST and not _too_much(trials):
        last = trial(trainer, size)
        if last is None:
            break
        trials.append(last)
        say(f"{size} pictures at once: {last.memory / 1e9:.2f} GB, {size / last.seconds:.1f} images/s")
        if last.memory > SHARE * limit(trainer.accelerator.device) or (best < size and not _worth(trials)):
            break
        best = size
    return best


def _worth(trials: list[Trial]) -> bool:
    before, last = (own.size / own.seconds for own in trials[-2:])
    return last > WORTH * before


def _too_much(trials: list[Trial]) -> bool:
    """Whether doubling once more would not fit, as memory grew so far: there is no second try on a CPU."""
    if len(trials) < 2 or torch.cuda.is_available():
        return False
    before, last = trials[-2:]
    return last.memory + 2 * (last.memory - before.memory) > SHARE * limit(torch.device("cpu"))


def trial(trainer: Trainer, size: int) -> Trial | None:
    """Steps of the first pictures that change nothing, twice: the first time costs more. None where they do not fit.

    Of several processes the same answer in all, that of the slowest and fullest; none waits for gradients of another.
    """
    accelerator = trainer.accelerator
    seconds, failed = 0.0, False
    try:
        batch = first_batch(trainer, size)
        for _ in range(2):
            start = time.monotonic()
            with torch.enable_grad(), trainer.executing(), accelerator.autocast():
                losses, _ = trainer.target(batch.to(accelerator.device))
                losses.sum().backward()
            still(trainer.parallel.optimizer)
            seconds = time.monotonic() - start
    except torch.OutOfMemoryError:
        failed = True
    own = torch.tensor([[failed, peak(accelerator.device), seconds]], dtype=torch.float64, device=accelerator.device)
    failed, memory, seconds = accelerator.gather(own).amax(0).tolist()
    return None if failed else Trial(size, int(memory), seconds)


def still(optimizer: Any) -> None:
    """A step of length 0, so that the optimizer has all that it keeps."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def first_batch(trainer: Trainer, size: int) -> Batch:
    """The first pictures of the data, as often as need be."""
    plan = MicroBatches(
        replace(trainer.order, batch=size), replace(trainer.part, rank=0, processes=1, micro=size), 0, 1
    )
    return next(batches(trainer.pictures, plan, 0))[0]


def peak(device: torch.device) -> int:
    """Most bytes held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit(device: torch.device) -> int:
    """Bytes that this process may hold: of the device, or of the machine and its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine.memory()


@dataclass
class Told:
    """Of which training it is told that memory is short; `micro` pictures go through the network at once."""

    config: Config
    micro: int


def levers(config: Config, micro: int) -> str:
    """What would make a run need less memory, and is not done yet."""
    found = [f"micro_batch={max(1, micro // 2)} (batch stays)"] if micro > 1 else []
    found += ["gradient_checkpointing=true"] if not (config.gradient_checkpointing or config.target == "prior") else []
    found += ["precision=bf16"] if config.precision == "no" else []
    caches = config.target not in ("prior", "autoencoder")  # which have none
    found += ["cache.folder=FOLDER"] if caches and config.cache.folder is None else []
    found += ["optimizer.name=adamw8bit"] if config.optimizer.name == "adamw" else []
    return ", ".join(found) or f"data.resolution={config.data.resolution // 2}"


def is_short(error: BaseException) -> bool:
    """Whether an error says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained(config: Config) -> Iterator[Told]:
    """Turns running out of memory into one line with levers; what is not known before the training is loaded may be set.

    Raises:
        MemoryError: with that line.
    """
    told = Told(config, config.micro_batch or (config.batch if config.batch != "auto" else 1))
    try:
        yield told
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not is_short(error):
            raise
        few = levers(told.config, told.micro)
        raise MemoryError(f"{told.micro} pictures at once do not fit into memory; try {few}") from None
