"""What the three trainings share: one loop with resume, an average of the weights and a schedule.

The planned length is a number of minutes of training; the learning rate warms up, holds and decays
to zero at the planned end, counted over all sittings.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from data import WORK
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass
class Plan:
    """How long, how fast and where to."""

    name: str
    minutes: float
    batch: int
    rate: float
    average: float = 0.998
    warmup: int = 200
    hold: float = 0.3  # the fraction of the planned time before the decay starts
    save_every: float = 180.0

    @property
    def path(self) -> Path:
        return WORK / f"{self.name}.pt"


def arguments(name: str, minutes: float, batch: int, rate: float) -> Plan:
    """The plan, with what the command line changes."""
    parser = argparse.ArgumentParser(prog=f"{name}.py")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, all sittings")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    args = parser.parse_args()
    return Plan(name, args.minutes, args.batch, args.rate)


def write(path: Path, content: dict) -> None:
    """Save beside and rename, so that a kill leaves the old checkpoint."""
    torch.save(content, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def averaged(name: str, module: nn.Module) -> nn.Module:
    """Load the averaged weights of a stage into `module`, ready to run."""
    state = torch.load(WORK / f"{name}.pt", map_location="cpu", weights_only=True)
    module.load_state_dict(state["average"])
    return module.eval().requires_grad_(False)


def rate_at(plan: Plan, steps: int, seconds: float) -> float:
    done = seconds / (plan.minutes * 60)
    decay = min(1.0, max(0.0, (1 - done) / (1 - plan.hold)))
    return plan.rate * min(1.0, (steps + 1) / plan.warmup) * decay


def join() -> tuple[int, int]:
    """Rank and number of processes: `torchrun --nproc_per_node 2` gives each core its own."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, 2 // world))
    if world > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world > 1 else 0
    torch.manual_seed(time.time_ns() + rank)
    return rank, world


def share(weights: list[nn.Parameter], seconds: float, world: int) -> float:
    """Average the gradients, and the clock, over the processes. Returns the clock."""
    if world == 1:
        return seconds
    grads = [p.grad for p in weights if p.grad is not None]
    flat = _flatten_dense_tensors(grads).bfloat16()  # half the traffic
    clock = torch.tensor([seconds])
    dist.all_reduce(flat)
    dist.all_reduce(clock)
    mean = _unflatten_dense_tensors(flat.float() / world, grads)
    torch._foreach_copy_(grads, list(mean))
    return float(clock) / world


class Run:
    """The state of a training: weights, their average, the optimizer and the counters."""

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        self.plan, self.module = plan, module
        self.rank, self.world = join()
        self.average = copy.deepcopy(module).requires_grad_(False)
        pairs = zip(self.average.parameters(), module.parameters(), strict=True)
        pairs = [(mean, p) for mean, p in pairs if p.requires_grad]
        self.means, self.weights = [mean for mean, _ in pairs], [p for _, p in pairs]
        self.optimizer = torch.optim.AdamW(self.weights, plan.rate, (0.9, 0.99), weight_decay=0.01, fused=True)
        self.steps, self.samples, self.seconds = 0, 0, 0.0
        if plan.path.exists():
            self.load()
        if self.world > 1:
            for weight in self.weights:
                dist.broadcast(weight.data, 0)

    def load(self) -> None:
        state = torch.load(self.plan.path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.samples = state["steps"], state["samples"]
        self.seconds = state["seconds"]

    def save(self) -> None:
        if self.rank > 0:
            return
        parts = {"module": self.module, "average": self.average, "optimizer": self.optimizer}
        content: dict = {name: part.state_dict() for name, part in parts.items()}
        content |= {"steps": self.steps, "samples": self.samples, "seconds": self.seconds}
        write(self.plan.path, content)

    def step(self, value: Tensor) -> None:
        """One step down the gradient of `value`; the average follows on the first process."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.plan, self.steps, self.seconds)
        self.optimizer.zero_grad()
        value.backward()
        self.seconds = share(self.weights, self.seconds, self.world)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        if self.rank == 0:
            momentum = min(self.plan.average, (self.steps + 1) / (self.steps + 10))
            torch._foreach_lerp_(self.means, [p.detach() for p in self.weights], 1 - momentum)
        self.steps += 1
        self.samples += self.plan.batch * self.world


def train(plan: Plan, module: nn.Module, batches: Iterable, loss: Callable[..., Tensor]) -> None:
    """Step down `loss(module, batch)` until the planned minutes are over, resuming."""
    run = Run(plan, module)
    print(f"{plan.name}: {sum(p.numel() for p in run.weights):,} weights, at {run.samples:,} samples")
    clock = saved = time.monotonic()
    recent: list[float] = []
    for batch in batches:
        if run.seconds >= plan.minutes * 60:
            break
        value = loss(module, batch)
        run.step(value)
        recent.append(value.item())
        now = time.monotonic()
        run.seconds, clock = run.seconds + now - clock, now
        if len(recent) == 100 and run.rank == 0:
            line = f"step {run.steps} samples {run.samples:,} minutes {run.seconds / 60:.1f}"
            speed = run.samples / run.seconds
            print(f"{line} loss {sum(recent) / 100:.4f} {speed:.1f}/s", flush=True)
        recent = recent if len(recent) < 100 else []
        if now - saved > plan.save_every:
            run.save()
            saved = now
    run.save()
    print(f"{plan.name}: {run.samples:,} samples in {run.seconds / 60:.1f} minutes", flush=True)
