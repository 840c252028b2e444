"""`diffusion-kit launch`: a training in several processes, here or on a cluster."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_kit.commands.console import note
from diffusion_kit.commands.remembering import add_history

if TYPE_CHECKING:
    from diffusion_kit.training.config import Config

ON = ("local", "deepspeed", "mpi", "slurm", "kubernetes")
AROUND = {
    "submit": "start it",
    "status": "its pods",
    "logs": "what it prints",
    "fetch": "copy the run here",
    "delete": "remove it",
}

PLANNED: dict[str, tuple[str, type, str]] = {
    "memory": ("GB", float, "of each device; by default what this machine has"),
    "devices": ("N", int, "of many: what each sends, what bounds a step, and what to use"),
    "rate": ("TFLOPS", float, "that a device really makes (150)"),
    "inside": ("GB/S", float, "that a device sends within its machine (300)"),
    "between": ("GB/S", float, "that a device sends to other machines (25)"),
    "each": ("N", int, "devices of a machine (8)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="of the training; its `launch` says where it runs")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="put over it: launch.processes=2")
    parser.add_argument("--on", choices=ON, help="what starts the processes, in place of launch.on")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and the files it needs")
    add_history(parser)
    ahead = parser.add_argument_group("before a run with DeepSpeed")
    ahead.add_argument("--prebuild", action="store_true", help="compile the operators that its first step would")
    ahead.add_argument(
        "--tune-aio", metavar="FOLDER", help="measure offload to FOLDER; prints `aio` for its configuration"
    )
    planned = parser.add_argument_group("a plan, without running")
    planned.add_argument("--plan", action="store_true", help="print what it needs, and the first way in which it fits")
    for name, (metavar, kind, line) in PLANNED.items():
        planned.add_argument(f"--{name}", metavar=metavar, type=kind, help=line)
    around = parser.add_argument_group("a job on Kubernetes")
    for name, line in AROUND.items():
        around.add_argument(f"--{name}", action="store_true", help=line)


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.training.config import read
    from diffusion_kit.training.launching import kubernetes, launch
    from diffusion_kit.training.launching.job import Job
    from diffusion_kit.training.planning.guard import check_fits

    check_options(options)
    overrides = [*options.overrides, *([f"launch.on={options.on}"] if options.on else [])]
    overrides += ["history=false"] if options.no_history else []
    config = read(options.config, overrides)
    if options.plan:
        make_plan(config, options)
        return
    job = Job(config, Path(options.config), tuple(overrides), options.resume)
    if options.prebuild or options.tune_aio:
        prepare(config, options)
        return
    asked = [name for name in AROUND if getattr(options, name)]
    if asked and config.launch.on != "kubernetes":
        raise ValueError(f"--{asked[0]} is for a job on Kubernetes: add --on kubernetes")
    process = kubernetes.command(job, asked[0]) if asked else launch.build(job)
    if options.dry_run:
        print(process)
        return
    if not asked:
        check_fits(config)
    process.run()


def prepare(config: Config, options: argparse.Namespace) -> None:
    """Does, or names, what can be done before a run with DeepSpeed."""
    import torch

    from diffusion_kit.training.parallel import aio, operators

    if config.deepspeed is None:
        raise ValueError("the configuration has no deepspeed, for which --prebuild and --tune-aio are")
    if options.prebuild and options.dry_run:
        print(" ".join(operators.needed(config, not torch.cuda.is_available())))
    elif options.prebuild:
        operators.build(config, print)
    if options.tune_aio and options.dry_run:
        print(f"{aio.count()} ways to write and read {aio.BYTES >> 20} MiB in {options.tune_aio}")
    elif options.tune_aio:
        print(json.dumps({"aio": aio.tune(options.tune_aio, note)}, indent=4))


def check_options(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option of a plan without one, or a number that is none.
    """
    given = {name: getattr(options, name) for name in PLANNED if getattr(options, name) is not None}
    if given and not options.plan:
        raise ValueError(f"--{next(iter(given))} belongs to a plan: add --plan")
    if rates := [name for name in given if name not in ("memory", "devices") and options.devices is None]:
        raise ValueError(f"--{rates[0]} is of many devices: say how many with --devices")
    if wrong := next((name for name, value in given.items() if not value > 0), None):
        raise ValueError(f"--{wrong} is {given[wrong]}: it must be more than 0")


def make_plan(config: Config, options: argparse.Namespace) -> None:
    """Says what a run needs.

    Raises:
        ValueError: nothing fits.
    """
    from diffusion_kit.training.planning.plan import plan

    given = {name: getattr(options, name) for name in PLANNED if getattr(options, name) is not None}
    devices = given.pop("devices", None)
    plan(config, print, devices, given)
