"""A small network in two processes, whose gradients are counted as DDP sends them; it imports nothing that takes long."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 50))


def hooked(rank: int, folder: str) -> None:
    """One of two processes: bytes of the gradients of a step, in a file named by its rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = nn.parallel.DistributedDataParallel(net())
    counts = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and not with strings
        counts.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    module.register_comm_hook(None, counting)
    module(torch.ones(4, 300)).sum().backward()
    Path(folder, str(rank)).write_text(str(sum(counts)))
    dist.destroy_process_group()
