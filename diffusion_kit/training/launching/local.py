"""torch's elastic launcher: on one machine, or the same command on each of several."""

from __future__ import annotations

import sys

from . import machine
from .config import LaunchConfig
from .job import Job
from .process import Process

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that are handed to the processes, which save and end
PATIENCE = 600  # seconds until one that has not ended is killed


def processes(launch: LaunchConfig) -> int:
    return machine.processes(launch.processes)


def build(job: Job) -> Process:
    launch, count = job.launch, processes(job.launch)
    return Process((*elastic(launch, str(count)), *job.module()), job.environment(count))


def elastic(launch: LaunchConfig, count: str, rank: str | None = None, address: str | None = None) -> tuple[str, ...]:
    """The launcher's part of the command line; `rank` and `address` may be what a shell says."""
    argv = [sys.executable, "-m", "diffusion_kit.training.launching.elastic", "--nproc_per_node", count]
    if launch.machines > 1:
        address = address or launch.address
        if address is None:
            raise ValueError("launch.address is missing: name the first of the machines")
        argv += ["--nnodes", str(launch.machines), "--node_rank", rank or str(launch.rank)]
        argv += ["--master_addr", address, "--master_port", str(launch.port)]
    else:
        argv += ["--standalone"]  # a free port
    if launch.restarts:
        argv += ["--max-restarts", str(launch.restarts)]
    return (*argv, "--signals-to-handle", SIGNALS, "--shutdown-timeout", str(PATIENCE))
