"""mpirun of Open MPI or of Intel MPI: it starts the processes, and torch's own backend joins them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

from . import deepspeed, local
from .config import LaunchConfig
from .job import Job
from .process import Process

Flavour = Literal["open", "intel"]


def flavour() -> Flavour:
    """Of the mpirun that is installed; Open MPI's where there is none, for a look."""
    if shutil.which("mpirun") is None:
        return "open"
    told = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    return "intel" if "Intel" in told or "HYDRA" in told.upper() else "open"


def build(job: Job, kind: Flavour | None = None) -> Process:
    """`-n` processes in all, so many a machine; the environment is forwarded to every one of them."""
    launch, kind = job.launch, kind or flavour()
    count = local.processes(launch)
    environment = job.environment(count)
    environment["MASTER_ADDR"] = address(launch)
    environment["MASTER_PORT"] = str(launch.port)
    argv = ["mpirun", "-n", str(count * launch.machines)]
    files: dict[Path, str] = {}
    if launch.hosts is not None:
        file, files = deepspeed.host_file(launch, count, Path(job.config.output))
        if files and kind == "intel":  # a name a line
            files = {file: "".join(f"{name}\n" for name in launch.hosts)}
        argv += ["--hostfile" if kind == "open" else "-f", str(file)]
    if launch.machines > 1:
        argv += ["--map-by", f"ppr:{count}:node"] if kind == "open" else ["-ppn", str(count)]
    if kind == "open":
        argv += ["--bind-to", "none"]  # else every process has one core
        if launch.hosts is None:
            argv += ["--oversubscribe"]  # else no more processes than cores
    for name, value in environment.items():
        argv += ["-x", name] if kind == "open" else ["-genv", name, value]
    return Process((*argv, *job.python()), environment, files)


def address(launch: LaunchConfig) -> str:
    """Of the first machine.

    Raises:
        ValueError: there are several, and the first is not named.
    """
    if launch.address is not None:
        return launch.address
    if launch.machines == 1:
        return "127.0.0.1"
    if not isinstance(launch.hosts, tuple):
        raise ValueError("launch.address is missing: name the first of the machines")
    return launch.hosts[0]
