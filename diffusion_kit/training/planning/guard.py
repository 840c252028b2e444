"""What a run needs at least, before anything is loaded: a run that its machine cannot hold is not started.

The kernel would kill it, often after long, and without a line. Only what is certain is counted: weights, gradients and
moments of a UNet that is trained, and frozen weights that are in another number type in memory than in their file. Frozen
weights of the same type stay in the file's own pages, which all processes share, and which the kernel may take back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from diffusion_kit.models.sources import locate, weight_files
from diffusion_kit.training.config import Config
from diffusion_kit.training.launching import machine

TYPES = {"no": ("F32", 4), "bf16": ("BF16", 2), "fp16": ("F16", 2)}  # of safetensors, and their bytes
TRAINED = 16  # bytes a number: float32 weights, gradients, AdamW's two moments
HELD = 4  # bytes a number without optimizer: weights


def check_fits(config: Config) -> None:
    """
    Raises:
        ValueError: a training on this machine's CPUs that needs more memory than it has.
    """
    launch = config.launch
    if launch.on not in ("local", "deepspeed") or launch.machines > 1 or launch.include or torch.cuda.is_available():
        return
    count = machine.processes(launch.processes)
    need, room = count * least(config, count), machine.memory()
    if need > room:
        raise ValueError(
            f"{count} processes need at least {need / 1e9:.1f} GB and this machine has {room / 1e9:.1f} GB: "
            "see with --plan what fits"
        )


def least(config: Config, processes: int) -> float:
    """Bytes of a process, at least."""
    folder = unet_folder(config)
    if folder is None:
        return 0
    found = numbers(folder, config.base.variant)
    total = sum(found.values())
    zero = zero_of(config)
    if config.target in ("unet", "hint_decoder"):
        return total * trained(config, zero, processes)
    kind, width = TYPES[config.precision]
    copied = total - found.get(kind, 0)
    if zero is None or zero.get("stage") != 3 or config.base.spread is False:
        return copied * width
    return 0 if (zero.get("offload_param") or {}).get("device") == "nvme" else copied * width / processes


def zero_of(config: Config) -> dict[str, Any] | None:
    """DeepSpeed's settings of ZeRO, where it is used."""
    if config.deepspeed is None:
        return None
    from diffusion_kit.training.parallel.settings import read  # which brings more with it than a launch needs

    return read(config.deepspeed).get("zero_optimization") or {}


def trained(config: Config, zero: Mapping[str, Any] | None, processes: int) -> float:
    """Bytes of a trained number in a process."""
    state = TRAINED - HELD
    if config.optimizer.name != "adamw" or (zero or {}).get("offload_optimizer"):
        state = 0
    if zero is None or zero.get("stage") in (None, 0):
        return HELD + state if zero is None else HELD / 2
    if zero["stage"] == 3:
        return (state + HELD / 2) / processes if not zero.get("offload_param") else 0
    return HELD / 2 + state / processes


def unet_folder(config: Config) -> Path | None:
    """Where the UNet's weights lie, if that is a folder on this disk."""
    try:
        place = locate(config.base.model)
    except (ValueError, FileNotFoundError):
        return None  # which the training says in its own words
    return place / "unet" if isinstance(place, Path) and (place / "unet").is_dir() else None


def numbers(folder: Path, variant: str | None) -> dict[str, int]:
    """How many numbers of each type a folder's safetensors files hold; only headers are read."""
    found: dict[str, int] = {}
    for file in weight_files(folder, variant):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                found[entry["dtype"]] = found.get(entry["dtype"], 0) + prod(entry["shape"])
    return found
