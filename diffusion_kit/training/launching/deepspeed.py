"""DeepSpeed's launcher: on this machine, or on all of a host file by ssh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from . import local
from .config import LaunchConfig
from .job import Job
from .process import Process


def build(job: Job) -> Process:
    launch, count = job.launch, local.processes(job.launch)
    argv = [str(Path(sys.executable).with_name("deepspeed"))]
    if launch.include is not None:
        argv += ["--include", launch.include]
    else:
        argv += ["--num_gpus" if torch.cuda.is_available() else "--num_accelerators", str(count)]
    files: dict[Path, str] = {}
    if launch.hosts is not None:
        file, files = host_file(launch, count, Path(job.config.output))
        argv += ["--hostfile", str(file)]
        if launch.include is None:  # which says it too
            argv += ["--num_nodes", str(launch.machines)]
    if launch.address is not None:
        argv += ["--master_addr", launch.address]
    argv += ["--master_port", str(launch.port), "--no_local_rank"]  # which it says in the environment too
    argv += ["--module", "diffusion_kit.cli", *job.train()]
    environment = job.environment(count)
    if launch.include is not None:
        environment["DIFFUSION_KIT_PROCESSES"] = ""  # as many as it names
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    if launch.hosts is not None:  # other machines are given what stands in a file
        file = Path(job.config.output).absolute()
        file = file.with_name(f"{file.name}.env")
        files = {**files, file: "".join(f"{name}={value}\n" for name, value in environment.items())}
        environment["DS_ENV_FILE"] = str(file)
    return Process(tuple(argv), environment, files)


def host_file(launch: LaunchConfig, count: int, folder: Path) -> tuple[Path, dict[Path, str]]:
    """The host file, and its text where it is to be written; a line a machine: "NAME slots=COUNT"."""
    if isinstance(launch.hosts, str):
        if not os.path.isfile(launch.hosts):
            raise FileNotFoundError(f"launch.hosts: no host file {Path(launch.hosts).absolute()}")
        return Path(launch.hosts), {}
    names = launch.hosts or ()
    if len(names) != launch.machines:
        raise ValueError(f"launch.hosts names {len(names)} machines, and launch.machines is {launch.machines}")
    file = folder.with_name(f"{folder.name}.hosts")
    return file, {file: "".join(f"{name} slots={count}\n" for name in names)}
