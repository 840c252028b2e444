"""Networks compiled ahead of time by torch's own compiler, and loaded by the next process in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree

from .converting import Converting
from .exported import Flat, filled, leaves, outputs_of, wide


class AOTI(Converting):
    """AOTInductor. On a CPU weights are laid out as oneDNN computes with them, which makes them a part of the package."""

    name = "aoti"
    runtime = "AOTInductor"

    def convert(self, flat: Flat, example: tuple[Tensor, ...], new: Path) -> None:
        on_cpu = all(value.device.type == "cpu" for value in example)
        exported = torch.export.export(flat, example)
        with torch._inductor.config.patch(freezing=on_cpu):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(new / "model.pt2"))

    def machine(self) -> str:
        """Its loops are made for so many threads and these instructions."""
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"

    def load(self, folder: Path, network: Any, inputs: Tree) -> Any:
        return Package(torch._inductor.aoti_load_package(str(folder / "model.pt2")), outputs_of(network, inputs))


@dataclass(frozen=True)
class Package:
    """A compiled network; `outputs` are tensors like those that it gives."""

    run: Any
    outputs: Tree

    def __call__(self, *inputs: Tree) -> Tree:
        results = self.run(*map(wide, leaves(inputs)))
        return filled(
            self.outputs, [own.to(like.dtype) for own, like in zip(results, leaves(self.outputs), strict=True)]
        )
