"""Trainings one after the other in the processes of one group: `torchrun ... parallel_worker.py CASES.json`.

A case is a configuration, whether it resumes, and a fault that is put into it on purpose, which a comparison has to find.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel

from diffusion_kit.training import bases
from diffusion_kit.training.config import parse
from diffusion_kit.training.loader import MicroBatches
from diffusion_kit.training.parallel.replicated import Replicated
from diffusion_kit.training.parallel.zero import Zero
from diffusion_kit.training.train import train

SHARING = (Replicated, Zero)
FAULTS = ("gradient x 1.5", "swapped samples", "skipped all-reduce")


def faulty(fault: str | None) -> ExitStack:
    """A wrong training inside the block."""
    stack = ExitStack()
    if fault == "gradient x 1.5":
        for cls in SHARING:
            right = cls.backward
            wrong: Any = lambda self, loss, right=right: right(self, 1.5 * loss)  # noqa: E731
            stack.enter_context(mock.patch.object(cls, "backward", wrong))
    elif fault == "swapped samples":
        right = MicroBatches.__iter__

        def swapped(self: Any) -> Any:  # every process has the samples of the first, and the others' are never seen
            return right(replace(self, part=replace(self.part, rank=0)))

        stack.enter_context(mock.patch.object(MicroBatches, "__iter__", swapped))
    elif fault == "loaded whole":  # no fault: the base, which is then spread
        stack.enter_context(mock.patch.object(bases, "spread_unet", return_value={}))
    elif fault == "never whole":
        stack.enter_context(mock.patch.object(UNet2DConditionModel, "from_pretrained", side_effect=AssertionError))
    elif fault == "skipped all-reduce":
        skipped: Any = lambda self, last: self.accelerator.no_sync(self.module)  # noqa: E731
        stack.enter_context(mock.patch.object(Replicated, "accumulating", skipped))
        for name in ("all_reduce", "reduce"):
            stack.enter_context(mock.patch(f"deepspeed.comm.{name}"))
        stack.enter_context(mock.patch("deepspeed.comm.reduce_scatter_fn", own_part))
        stack.enter_context(mock.patch(COALESCED, own_part))
    return stack


COALESCED = "deepspeed.runtime.comm.coalesced_collectives._torch_reduce_scatter_fn"


def own_part(*given: Any, **more: Any) -> None:
    """In place of a reduce-scatter: every process keeps its own part of its own tensor."""
    parts = [value for value in (*given, *more.values()) if isinstance(value, torch.Tensor)]
    whole, part = sorted(parts, key=torch.Tensor.numel, reverse=True)
    part.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])


def main(file: str) -> None:
    for case in json.loads(Path(file).read_text()):
        with faulty(case.get("fault")):
            train(parse(case["config"], "case"), resume=case.get("resume", False))


if __name__ == "__main__":
    main(sys.argv[1])
