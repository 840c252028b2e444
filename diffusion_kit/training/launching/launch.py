"""A training's processes by the launcher that its configuration, or the command line, names."""

from __future__ import annotations

from collections.abc import Callable

from . import deepspeed, kubernetes, local, mpi, slurm
from .job import Job
from .process import Process

LAUNCHERS: dict[str, Callable[[Job], Process]] = {
    "local": local.build,
    "deepspeed": deepspeed.build,
    "mpi": mpi.build,
    "slurm": slurm.build,
    "kubernetes": kubernetes.build,
}


def build(job: Job) -> Process:
    """What is run, and what a dry run prints.

    Raises:
        ValueError, FileNotFoundError: the configuration lacks what the launcher needs, in one line.
    """
    if job.launch.restarts and job.launch.on in ("deepspeed", "mpi"):
        raise ValueError(f"launch.restarts is torch's launcher's: on={job.launch.on} starts no process again")
    return LAUNCHERS[job.launch.on](job)
