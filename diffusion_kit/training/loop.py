"""The loop that every target is trained in: it reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_kit.models.attention import installed

from .checkpoints import Checkpoint
from .config import Config
from .data.order import Order
from .data.samples import Batch, Pictures, Sample
from .ema import Average
from .loader import MicroBatches, Part, batches
from .optimizers import learning_rate
from .parallel import make_parallel
from .parallel.parallel import Moments
from .precision import cure
from .targets.target import Target

BANDS = 10  # of noise levels, for the loss by band
SPIKE = 6.0  # standard deviations above the running mean of the loss
NAMED = 8  # samples in a line
TROUBLE = 3  # steps with a loss or gradient that is not finite, one after the other, before a line says what helps
PATIENCE = 20  # steps with a loss that is not finite, or without a picture, one after the other, before the run stops


@dataclass
class Figures:
    """What is known of the steps since the last line of the log, and of the whole run.

    Attributes:
        used: samples that could be used.
        bad: samples that could not, and why.
        lost, empty: steps up to this one, one after the other, that were left out: not finite, without a picture.
    """

    losses: list[float] = field(default_factory=list)
    band_sums: list[float] = field(default_factory=lambda: [0.0] * BANDS)
    band_counts: list[int] = field(default_factory=lambda: [0] * BANDS)
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    lost: int = 0
    empty: int = 0
    used: float = 0
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, losses: Tensor, levels: Tensor) -> None:
        """(B,) of a step."""
        for value, level in zip(losses.tolist(), levels.tolist(), strict=True):
            band = min(int(level * BANDS), BANDS - 1)
            self.band_sums[band] += value
            self.band_counts[band] += 1

    def step(self, loss: float) -> bool:
        """Whether a step's loss stands out."""
        self.losses.append(loss)
        self.seen += 1
        gap = loss - self.mean
        spike = self.seen > 50 and gap > SPIKE * math.sqrt(self.variance)
        share = max(0.01, 1 / self.seen)
        self.mean += share * gap
        self.variance += share * (gap * gap - self.variance)
        return spike

    def line(self) -> dict[str, Any]:
        """Means since the last line, which are forgotten."""
        bands = [total / n if n else None for total, n in zip(self.band_sums, self.band_counts, strict=True)]
        loss = sum(self.losses) / len(self.losses) if self.losses else None  # every step was left out
        self.losses, self.band_sums, self.band_counts = [], [0.0] * BANDS, [0] * BANDS
        return {"loss": loss, "loss_by_noise": bands, "bad_samples": len(self.bad)}


@dataclass
class Trainer:
    """A training at one of its steps.

    Attributes:
        step: how many steps were made.
        say: takes a line for the user.
        cured: whether what helps against numbers that are not finite was said.
    """

    config: Config
    accelerator: Accelerator
    target: Target
    pictures: Pictures
    say: Callable[[str], None] = print
    step: int = 0
    figures: Figures = field(default_factory=Figures)
    cured: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.parallel = make_parallel(config, self.accelerator, self.target, self.say)
        self.average = Average(self.parallel.pieces(), config.ema) if config.ema else None
        held = config.data.holdout
        count = len(self.pictures) - held
        batch = int(config.batch)
        if batch % self.accelerator.num_processes:
            told = f"batch is {batch}, which {self.accelerator.num_processes} processes cannot share"
            raise ValueError(f"{told}: make it a multiple of their number")
        self.order = Order(self.pictures.shapes[:count], self.pictures.weights[:count], batch, config.seed)
        processes = self.accelerator.num_processes
        self.part = Part(self.accelerator.process_index, processes, config.micro_batch or batch // processes)

    def run(self, after: Callable[[Trainer], bool]) -> None:
        """Steps to the end, or until `after`, called after each, is true."""
        plan = MicroBatches(self.order, self.part, self.step, self.config.steps)
        for micro_batches in batches(self.pictures, plan, self.config.data.workers):
            with torch.enable_grad(), self.executing():
                self.learn(micro_batches)
            if after(self):
                return

    @contextmanager
    def executing(self) -> Iterator[None]:
        """Networks see what the executor gives their attention; in bfloat16 on a CPU by plain products, as the fused ones
        take up to six times as long backwards there."""
        slow = self.accelerator.device.type == "cpu" and self.config.precision == "bf16"
        with installed(*self.target.executed), sdpa_kernel(SDPBackend.MATH) if slow else nullcontext():
            yield

    def learn(self, micro_batches: list[Batch]) -> None:
        """One step of the optimizer."""
        if not self._any(micro_batches):
            self._note_empty(micro_batches)
            self.step += 1
            return
        if not self.parallel.scheduled:
            self.set_rate()
        torch.manual_seed(hash((self.config.seed, self.step)) & 0x7FFFFFFF)  # of networks that have dropout
        parts = []
        for k, batch in enumerate(micro_batches):
            with self.parallel.accumulating(last=k == len(micro_batches) - 1):
                losses, levels = self.parallel.module(batch.to(self.accelerator.device))
                weighted = losses * batch.weight.to(losses)
                # Processes' gradients are averaged, so each sum is over the batch of one process.
                self.parallel.backward(weighted.sum() * self.part.processes / self.order.batch)
            parts.append((batch, losses.detach(), levels))
        samples = [sample for batch, _, _ in parts for sample in batch.samples]
        seen = self._seen(samples, parts)
        finite = self.parallel.update()
        if self.average is not None:
            self.average.update(self.parallel.pieces(), self.step)
        self._note(samples, seen, finite)
        self.step += 1

    def set_rate(self) -> None:
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = rate

    def _any(self, micro_batches: list[Batch]) -> bool:
        """Whether any process has a picture for this step."""
        return self.any(any(sample.weight for batch in micro_batches for sample in batch.samples))[0]

    def any(self, *own: bool) -> list[bool]:
        """Whether each holds in any process: the same answer in all of them."""
        if self.part.processes == 1:
            return list(own)
        flags = torch.tensor([own], dtype=torch.int32, device=self.accelerator.device)
        return [bool(flag) for flag in self.accelerator.gather(flags).amax(0).tolist()]

    def _seen(self, samples: Sequence[Sample], parts: list[tuple[Batch, Tensor, Tensor]]) -> Tensor:
        """(B, 3): loss, noise level and weight of every sample of a step, of all processes."""
        own = torch.stack(
            [
                torch.cat([losses for _, losses, _ in parts]),
                torch.cat([levels for _, _, levels in parts]),
                torch.tensor([sample.weight for sample in samples], device=self.accelerator.device),
            ],
            1,
        )
        seen = self.accelerator.gather(own.float()).cpu()
        self.figures.used += float(seen[:, 2].sum())
        if not seen[:, 2].all():
            self._note_bad(samples)
        return seen

    def _note(self, samples: Sequence[Sample], seen: Tensor, finite: bool) -> None:
        """What a step gave."""
        losses, levels, weights = seen.unbind(1)
        first = self.part.rank * len(samples)
        own = losses[first : first + len(samples)].tolist()
        self.figures.empty = 0
        if not torch.isfinite(losses).all():
            lost = [s.name for s, loss in zip(samples, own, strict=True) if not isfinite(loss)]
            self._note_lost("loss", gather_object(lost))
            return
        if not finite:
            self._note_lost("gradient", gather_object([sample.name for sample in samples]))
            return
        self.figures.lost = 0
        used = weights > 0
        self.figures.add(losses[used], levels[used])
        if self.figures.step(float(losses[used].double().mean())):
            named = gather_object([(loss, sample.name) for sample, loss in zip(samples, own, strict=True)])
            told = ", ".join(f"{name} ({loss:.3g})" for loss, name in sorted(named, reverse=True)[:4])
            self.say(f"step {self.step + 1}: the loss stands out, {float(losses.mean()):.4g}: {told}")

    def _note_empty(self, micro_batches: list[Batch]) -> None:
        """A step without a picture changes nothing."""
        self._note_bad([sample for batch in micro_batches for sample in batch.samples])
        self.figures.empty += 1
        most = PATIENCE if self.figures.used else min(self.order.length(0), PATIENCE)
        if self.figures.empty >= most:
            problem = list(self.figures.bad.values())[-1]
            raise ValueError(
                f"no picture of the data could be used in {most} steps one after the other; the last: {problem}"
            )

    def _note_bad(self, samples: Sequence[Sample]) -> None:
        for name, problem in gather_object([(sample.name, sample.problem) for sample in samples if sample.problem]):
            if name not in self.figures.bad:
                self.figures.bad[name] = problem
                self.say(f"left out: {problem}")

    def _note_lost(self, what: str, names: list[str]) -> None:
        self.figures.lost += 1
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        self.say(
            f"step {self.step + 1}: the {what} is not finite, the step is left out: {', '.join(names[:NAMED])}{more}"
        )
        if self.figures.lost >= PATIENCE:
            told = f"the {what} was not finite in {PATIENCE} steps one after the other"
            raise RuntimeError(f"{told}: {cure(self.config, what)}")
        if self.figures.lost >= TROUBLE and not self.cured:
            self.cured = True
            self.say(f"the {what} was not finite in {TROUBLE} steps one after the other: {cure(self.config, what)}")

    # State

    def checkpoint(self) -> Checkpoint:
        """Whole, in every process; all take part."""
        moments = self.parallel.moments()
        tensors = {"weights": self.parallel.weights(), "optimizer": moments.tensors}
        if self.average is not None:
            tensors["ema"] = self.parallel.joined(self.average.means)
        state = {
            "step": self.step,
            "data": self.pictures.digest,
            "figures": vars(self.figures),
            "optimizer": moments.values,
        }
        return Checkpoint(tensors, state)

    def load(self, checkpoint: Checkpoint) -> None:
        weights, own = checkpoint.tensors["weights"], checkpoint.state["optimizer"]
        self.parallel.load(weights, Moments(dict(checkpoint.tensors["optimizer"]), own))
        if self.average is not None:
            self.average.load(self.parallel.cut(checkpoint.tensors.get("ema", weights)))
        self.step = checkpoint.state["step"]
        self.figures = Figures(**checkpoint.state["figures"])

    def averaged(self) -> AbstractContextManager[None]:
        """The target wears its averaged weights inside the block, if there are any."""
        return self.parallel.worn(self.average.means if self.average is not None else None)
