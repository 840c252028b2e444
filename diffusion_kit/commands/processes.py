"""Pictures of a job file by several processes, which a launcher started (torchrun and its kin): each makes its share.

With a DeepSpeed configuration the network that is denoised with is spread over them.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_kit.making.job import Settings

from .console import note
from .generate import note_there, planned
from .plan import Planned
from .remembering import remembering
from .workers import Failed, code_of

if TYPE_CHECKING:
    from diffusion_kit.training.parallel.inference import Together

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how launchers say how many there are
SELF_CHOSEN = ("optimize", "engine", "low_memory")


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(int(os.environ.get(name, 1)) > 1 for name in SIZES)


def run(options: argparse.Namespace) -> None:
    if not options.jobs:
        raise ValueError("several processes, and --deepspeed, share the lines of a job file: give --jobs")
    rank, count = join(options.deepspeed is not None)
    import torch.distributed as dist

    try:
        tree = settings(options) if options.deepspeed is not None else None
        plan, before = of_first(lambda: pictured(options))
        failures, there = make(options, plan, before, tree)
        every: list[Any] = [None] * count
        dist.all_gather_object(every, (failures, there))
        if rank == 0:
            note_there(sum(own for _, own in every), len(plan))
        if code := code_of([failed for own, _ in every for failed in own]):
            raise SystemExit(code)  # of all: a launcher ends the others where one fails before them
    finally:
        dist.destroy_process_group()


def join(spread: bool) -> tuple[int, int]:
    """This process's number in the group, and how many there are."""
    import torch
    import torch.distributed as dist

    from diffusion_kit.training import group

    group.from_mpi()
    if spread:
        from diffusion_kit.training.parallel import zero

        zero.require()
        group.alone(not torch.cuda.is_available())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=group.PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's configuration, whose number type is that of the command too.

    Raises:
        FileNotFoundError, ValueError: it cannot be used, in one line.
    """
    from diffusion_kit.training.parallel import inference

    if given := next((name for name in SELF_CHOSEN if getattr(options, name)), None):
        raise ValueError(f"--deepspeed and --{given.replace('_', '-')} do not go together")
    tree = inference.read_inference(options.deepspeed)
    options.dtype = inference.dtype_said(tree, options.dtype)
    return tree


def pictured(options: argparse.Namespace) -> tuple[list[Planned], set[Path]]:
    """The plan, and the pictures that were there."""
    plan = planned(options)
    return plan, {each.file for each in plan if each.file.exists()}


def of_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all; its error is told once."""
    import torch.distributed as dist

    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [make()]
        finally:
            dist.broadcast_object_list(box, device=_cpu())
    else:
        dist.broadcast_object_list(box, device=_cpu())
        if box[0] is None:
            raise SystemExit(2)
    return box[0]


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def make(
    options: argparse.Namespace, plan: list[Planned], before: set[Path], tree: dict[str, Any] | None
) -> tuple[list[Failed], int]:
    """Makes this process's share; what failed, and how many pictures were there."""
    import torch.distributed as dist

    from diffusion_kit.making import loading

    from . import shares

    own = replace(plan[0].settings, device=options.device or loading.device_of(plan[0].settings))
    pipe, together = load(own, options.debug, tree)
    pipe.set_progress_bar_config(disable=True)
    maker = shares.Maker(pipe, options.jobs)
    with pipe.sharing(), remembering(options) as recorder:
        report = shares.Report(options.jobs, before, recorder)
        for each in plan[dist.get_rank() :: dist.get_world_size()]:
            report.add(each, maker.outcome(each))
            if together is not None and together.running:
                raise RuntimeError("the spread network failed while all ran it: every process ends")
        if together is not None:
            together.accompany()
    return report.failures, report.there


def load(own: Settings, debug: bool, tree: dict[str, Any] | None) -> tuple[Any, Together | None]:
    """The model, and what keeps processes together that share its network."""
    from diffusion_kit.making import loading

    if tree is None:
        return loading.load_pipeline(own, note, debug=debug), None
    from diffusion_kit.training.parallel import inference

    if not debug:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dtype, folder = loading.dtype_of(own), network_folder(own.model)
    more = {} if folder is None else {"unet": inference.load_inference(folder, tree, dtype)}
    pipe = loading.load_pipeline(own, note, debug=debug, **more)
    return pipe, inference.Together(pipe.unet, tree, dtype)


def network_folder(model: str) -> Path | None:
    """Of the network that is spread; None of a single file, from which it is loaded whole before that."""
    from diffusion_kit.models.sources import check_folder, locate, one_line

    place = locate(model)
    if isinstance(place, Path):
        if place.is_file():
            return None
        check_folder(place, passed=set())
        return place / "unet"
    from huggingface_hub import snapshot_download

    with one_line(model, "model"):
        return Path(snapshot_download(place, allow_patterns=["unet/*.json", "unet/*.safetensors"])) / "unet"
