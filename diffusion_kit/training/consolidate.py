"""Of a run's checkpoint what diffusers loads, away from the run: by one process, however many wrote it and however they
shared the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from diffusion_kit.models.sources import locate

from . import checkpoints
from .config import Config, read
from .memory import limit
from .run import Run
from .targets import make_target
from .targets.target import Target

LAST, BEST = "last", "best"
COPIES = 2  # of the checkpoint's weights in memory: as they are read, and in the network


def consolidate(
    run: Path, out: Path, *, which: str = LAST, averaged: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a result of a checkpoint, beside its place and then renamed; the checkpoint.

    Args:
        run: folder of the run.
        which: "last", "best" (by the validations' fidelity), or the number of a step.
        averaged: the moving average of the weights, where the run has one, as in its result.
        dtype: of the numbers that are written.

    Raises:
        FileNotFoundError, ValueError: no such run, checkpoint or base, or a target whose result needs its data.
        MemoryError: less memory is free than this takes.
    """
    folder = checkpoint_of(run, which)
    config = read(run / "config.yaml").model_copy(update={"deepspeed": None})
    if config.target == "autoencoder":
        raise ValueError(
            "an autoencoder's result has what its latents measure on the data: let the run end, by its steps"
        )
    average = folder / "ema.safetensors"
    file = average if averaged and average.is_file() else folder / "weights.safetensors"
    check_memory(config, folder)
    target = make_target(config, torch.device("cpu"))
    tensors = checkpoints.read(folder).tensors
    weights = {**tensors["weights"], **tensors[file.stem]}
    if averaged and file != average and config.optimizer.name == "schedule_free":
        to_average(weights, tensors["optimizer"], config.optimizer.betas[0])
    fill(target, weights)
    if dtype != torch.float32:
        target.to(dtype)
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        target.save(beside)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def to_average(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], beta: float) -> None:
    """From y, at which schedule-free AdamW takes gradients, to x, which it has learned, in place and bit for bit as its own
    `eval` goes: y = (1 - beta) z + beta x (arXiv 2405.15682, eq. 3)."""
    for name, weight in weights.items():
        if (z := moments.get(f"{name}:z")) is not None:
            weight.lerp_(end=z, weight=1 - 1 / beta)


def checkpoint_of(run: Path, which: str) -> Path:
    """
    Raises:
        FileNotFoundError: no run. ValueError: it has no such checkpoint.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run: it has no config.yaml, which a training writes into its output")
    found = {checkpoints.step_of(folder): folder for folder in checkpoints.whole(run / "checkpoints")}
    if not found:
        raise ValueError(f"{run} has no whole checkpoint")
    if which == BEST and Run(run).best() is None:
        raise ValueError(f"{run} has no best checkpoint: no validation measured how faithfully a control is followed")
    step = {LAST: max(found), BEST: Run(run).best()}.get(which, int(which) if which.isdigit() else None)
    if step not in found:
        raise ValueError(f"{run} has no whole checkpoint {which}; there are {', '.join(map(str, found))}")
    return found[step]


def check_memory(config: Config, folder: Path) -> None:
    """
    Raises:
        MemoryError: less is free than base and checkpoint take.
    """
    needed = COPIES * sum(file.stat().st_size for file in folder.glob("*.safetensors")) + size_of(config.base.model)
    machine = psutil.virtual_memory()
    free = min(machine.available, limit(torch.device("cpu")) - machine.used)
    if needed > free:
        raise MemoryError(f"{folder} and its base take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def size_of(model: str) -> int:
    """Bytes of a base's weights on disk; 0 where they are not there yet."""
    place = locate(model)
    if not isinstance(place, Path):
        return 0
    files = [place] if place.is_file() else [Path(root) / name for root, _, names in os.walk(place) for name in names]
    return sum(file.stat().st_size for file in files if file.suffix == ".safetensors")


@torch.no_grad()
def fill(target: Target, weights: dict[str, torch.Tensor]) -> None:
    for name, value in target.kept().items():
        value.copy_(weights[name])
