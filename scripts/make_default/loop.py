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


def train(plan: Plan, module: nn.Module, batches: Iterable, loss: Callable[..., Tensor]) -> None:
    """Run `loss(module, batch)` until the planned minutes are over, resuming where it stopped."""
    rank, world = join()
    average = copy.deepcopy(module).requires_grad_(False)
    weights = [p for p in module.parameters() if p.requires_grad]
    pairs = list(zip(module.parameters(), average.parameters(), strict=True))
    pairs = [(mean, p) for p, mean in pairs if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, plan.rate, (0.9, 0.99), weight_decay=0.01, fused=True)
    steps, samples, seconds = 0, 0, 0.0
    if plan.path.exists():
        state = torch.load(plan.path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        steps, samples, seconds = state["steps"], state["samples"], state["seconds"]
    if world > 1:
        for weight in weights:
            dist.broadcast(weight.data, 0)
    print(f"{plan.name}: {sum(p.numel() for p in weights):,} weights, from sample {samples:,}")

    def save() -> None:
        if rank > 0:
            return
        content = {"module": module.state_dict(), "average": average.state_dict()}
        content |= {"optimizer": optimizer.state_dict()}
        write(plan.path, content | {"steps": steps, "samples": samples, "seconds": seconds})

    clock = saved = time.monotonic()
    total, count = 0.0, 0
    for batch in batches:
        if seconds >= plan.minutes * 60:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(plan, steps, seconds)
        value = loss(module, batch)
        optimizer.zero_grad()
        value.backward()
        seconds = share(weights, seconds, world)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if rank == 0:
            momentum = min(plan.average, (steps + 1) / (steps + 10))
            torch._foreach_lerp_([m for m, _ in pairs], [p.detach() for _, p in pairs], 1 - momentum)
        steps, samples = steps + 1, samples + plan.batch * world
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        total, count = total + value.item(), count + 1
        if steps % 100 == 0 and rank == 0:
            line = f"step {steps} samples {samples:,} minutes {seconds / 60:.1f}"
            speed = samples / seconds
            print(f"{line} loss {total / count:.4f} {speed:.1f}/s", flush=True)
            total, count = 0.0, 0
        if now - saved > plan.save_every:
            save()
            saved = now
    save()
    print(f"{plan.name}: done, {samples:,} samples in {seconds / 60:.1f} minutes", flush=True)
