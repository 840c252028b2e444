"""Checkpoints that are whole or not there: written beside, synced, marked complete, renamed; pruned afterwards.

A checkpoint is a folder `step-00001000` with safetensors, `state.json` and, written last, `COMPLETE.json` with the size of
every file. The newest folder whose manifest holds is where a run goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "COMPLETE.json"
PART = ".part-"  # begins the name of a folder that is being written or removed
SETTINGS = ("lr", "betas", "eps", "weight_decay", "warmup_steps")  # of an optimizer, that the configuration says
SPARE = 1.1  # of the size of a checkpoint that must be free before it is written


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        tensors: by file ("weights", "ema", "optimizer"), tensors by name.
        state: what JSON can write.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for part in self.tensors.values() for value in part.values())


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """
    Raises:
        OSError: the disk is full or cannot be written to; what was there before is still there.
    """
    check_space(root, checkpoint.bytes)
    beside = root / f"{PART}{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for name, tensors in checkpoint.tensors.items():
            kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            save_file(kept, beside / f"{name}.safetensors")
        (beside / "state.json").write_text(json.dumps(checkpoint.state, indent=1) + "\n")
        seal(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    final = folder_of(root, step)
    shutil.rmtree(final, ignore_errors=True)  # of a step that is written again, after a rename that was not synced
    os.rename(beside, final)
    sync(root)
    return final


def seal(folder: Path) -> None:
    """Syncs every file and writes the manifest behind them."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        sync(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({str(file.relative_to(folder)): file.stat().st_size for file in files}) + "\n")
    sync(manifest)
    sync(folder)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def has_space(root: Path, size: int) -> bool:
    """Whether what a checkpoint of so many bytes needs is free."""
    root.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(root).free >= int(size * SPARE)


def check_space(folder: Path, size: int) -> None:
    """
    Raises:
        OSError: less than a checkpoint of so many bytes needs is free.
    """
    if not has_space(folder, size):
        free, needed = shutil.disk_usage(folder).free, size * SPARE
        raise OSError(f"{folder} has {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB: make room")


def is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError):
        return False


def whole(root: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    folders = [folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]
    return sorted((folder for folder in folders if is_whole(folder)), key=step_of)


def read(folder: Path) -> Checkpoint:
    tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(tensors, json.loads((folder / "state.json").read_text()))


def prune(root: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the last `keep` checkpoints and that of the step `best`, and what was left half-written."""
    for folder in root.glob(f"{PART}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in whole(root)[:-keep]:
        if step_of(folder) != best:
            remove(folder)


def cut(root: Path, step: int) -> list[int]:
    """Removes what is newer than the step at which a run goes on, and says which steps': another machine lacks them, and
    newer ones would be kept in place of those that all have."""
    newer = [folder for folder in whole(root) if step_of(folder) > step]
    for folder in newer:
        with suppress(FileNotFoundError):  # another machine's, which removes them too, after all
            remove(folder)
    return [step_of(folder) for folder in newer]


def remove(folder: Path) -> None:
    """Renamed first, so that what is left of an interrupted removal is no checkpoint and the next one removes it."""
    gone = folder.with_name(PART + folder.name)
    os.rename(folder, gone)
    shutil.rmtree(gone)


# An optimizer's state as tensors by name and values for JSON


def flat_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Args:
        names: of the parameters, in the optimizer's order.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for name, weight in zip(names, weights, strict=True):  # not `state_dict`, in which some optimizers nest their own
        for key, value in optimizer.state.get(weight, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{name}:{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"values": values, "groups": groups}


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    numbers = {name: number for number, name in enumerate(names)}
    entries: dict[int, dict[str, Any]] = {}
    for full, value in _entries(tensors, state["values"]):
        name, _, key = full.rpartition(":")
        entries.setdefault(numbers[name], {})[key] = value
    own = optimizer.state_dict()
    groups = [
        {**group, **kept, **{key: group[key] for key in SETTINGS if key in group}}  # those may have been changed
        for group, kept in zip(own["param_groups"], state["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _entries(*parts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in parts:
        yield from part.items()
