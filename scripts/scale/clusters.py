"""Launchers that start processes on several machines by ssh; here loopback addresses, and a stand-in for ssh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from . import runs
from .runs import (
    ended,
    given,
    hosts_asked,
    must_be_near,
    must_be_same,
    need,
    new,
    stand_in_for_ssh,
    start,
    trained,
    wait_for_step,
)

HOSTS = ["127.0.0.1", "127.0.0.2"]
TOLD = {"DIFFUSION_KIT_TOLD": "as it is"}
TWO_HOSTS = {"processes": 1, "machines": 2, "hosts": HOSTS}


def finish_told(out: Path, **more: Any) -> None:
    """A run, both of whose processes were given the environment that its configuration names."""
    process = start(out, **more)
    wait_for_step(out, 1, process)
    found = given(out, next(iter(TOLD)))
    ended(out, process)
    need(found == dict.fromkeys("01", "as it is"), f"{out.name}: the environment was not forwarded: {found}")


def mpi() -> dict[str, Any]:
    """`mpirun` of Open MPI over two hosts with one process each: the bits of two processes of torch's launcher."""
    runs.installed("mpirun", "openmpi-bin")
    ssh = stand_in_for_ssh(runs.WORK / "ssh-mpi")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = new("mpi", launch={**TWO_HOSTS, "on": "mpi", "environment": root | TOLD})
    finish_told(out, OMPI_MCA_plm_rsh_agent=str(ssh))
    asked = hosts_asked(ssh.parent)
    need(HOSTS[1] in asked, f"the second host was not asked: {asked}")
    need(runs.processes(out) == 2, "two processes did not join")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return {"mpirun": version, "hosts by ssh": asked, "same bits": must_be_same(trained("two", 2), out)}


def deepspeed_launcher() -> dict[str, Any]:
    """DeepSpeed's launcher under ZeRO 2: on one host of a host file with two devices, and on two hosts by pdsh."""
    runs.installed("pdsh", "pdsh")
    python = with_deepspeed()
    ssh = stand_in_for_ssh(runs.WORK / "ssh-deepspeed")
    path = f"{ssh.parent}:{os.environ['PATH']}"
    figures: dict[str, Any] = {}
    one_host = {"processes": 2, "hosts": ["localhost"], "include": "localhost:0,1", "bind": True}
    for name, own in {"one host": one_host, "two hosts": TWO_HOSTS}.items():
        zero = {"zero_optimization": {"stage": 2}}
        out = new(
            f"deepspeed-{name.replace(' ', '-')}",
            deepspeed=zero,
            launch={"on": "deepspeed", "address": HOSTS[0], "environment": TOLD, **own},
        )
        finish_told(out, python=python, PATH=path)
        need(runs.processes(out) == 2, f"{name}: two processes did not join")
        gap = must_be_near(trained("two", 2), out)
        figures[name] = {"apart from DDP": gap, "same bits": not runs.differing(trained("two", 2), out)}
    asked = hosts_asked(ssh.parent)
    need(set(HOSTS) <= set(asked), f"not all hosts were asked: {asked}")
    return {**figures, "hosts by ssh": asked}


def with_deepspeed() -> str:
    return runs.python_with("deepspeed", "deepspeed>=0.19.8,<0.20")
