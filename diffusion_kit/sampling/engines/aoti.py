"""Networks compiled ahead of time by torch's own compiler, and loaded by the next process in seconds."""

from __future__ import annotations

import platform
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.pt2_archive._package import AOTICompiledModel

from diffusion_kit.sampling.doors import Tree

from .converting import Converting
from .exported import Flat, current, filled, leaves, outputs_of, plain
from .pages import forget_pages_of

CPU = Path("/proc/cpuinfo")


class AOTI(Converting):
    """AOTInductor. On a CPU weights are laid out as oneDNN computes with them, which makes them a part of the package."""

    name = "aoti"
    runtime = "AOTInductor"

    def convert(self, flat: Flat, example: tuple[Tensor, ...], new: Path) -> None:
        on_cpu = all(value.device.type == "cpu" for value in example)
        exported = torch.export.export(flat, example)
        package = new / "model.pt2"
        with torch._inductor.config.patch(freezing=on_cpu), current(example[0].device):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
        with zipfile.ZipFile(package) as packed:  # as every process would do that loads it
            packed.extractall(new)
        package.unlink()

    def machine(self, device: torch.device) -> str:
        """Its loops are made for so many threads and these instructions, its kernels for this kind of card."""
        card = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        form = "unpacked"  # there may be others of an earlier kit
        return f"{form}, {torch.get_num_threads()} threads, {instructions()}, {card}"

    def load(self, folder: Path, network: Any, inputs: Tree) -> Any:
        device = leaves(inputs)[0].device
        index = -1 if device.index is None else device.index
        loader = torch._C._aoti.AOTIModelPackageLoader(str(folder / "model"), "model", False, 1, index)
        forget_pages_of(folder)  # of whose weights it has made copies, keeping Python's lock: no thread could look on
        return Package(AOTICompiledModel(loader), outputs_of(network, inputs), device)


@cache
def instructions() -> str:
    """What the processor knows: a compiler takes all of it."""
    lines = CPU.read_text().splitlines() if CPU.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@dataclass(frozen=True)
class Package:
    """A compiled network; `outputs` are tensors like those that it gives."""

    run: Any
    outputs: Tree
    device: torch.device

    def __call__(self, *inputs: Tree) -> Tree:
        with current(self.device):
            results = self.run(*map(plain, leaves(inputs)))
        return filled(
            self.outputs, [own.to(like.dtype) for own, like in zip(results, leaves(self.outputs), strict=True)]
        )
