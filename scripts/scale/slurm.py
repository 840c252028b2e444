"""SLURM: a cluster of two virtual nodes on this machine, without systemd, and the kit's batch script on it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import runs
from .runs import must_be_same, need, new, said, trained, wait_for, wait_for_step

NODES = ("n1", "n2")
CONF = """\
ClusterName=kit
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort=17000
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=120
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Inside the block there is a cluster of two nodes; the environment of its commands."""
    runs.installed("slurmctld", "slurm-wlm munge")
    folder = runs.WORK / "cluster"
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={17001 + k} CPUs=1 State=UNKNOWN"
        for k, node in enumerate(NODES)
    )
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, nodes=nodes))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with ExitStack() as stack:
        stack.enter_context(named(NODES))
        stack.enter_context(daemon(munge(folder), folder, environment))
        wait_for((folder / "munge.socket").exists, "munge", 30)
        stack.enter_context(daemon(["slurmctld", "-D", "-c"], folder, environment))
        for node in NODES:
            stack.enter_context(daemon(["slurmd", "-D", "-N", node], folder, environment))
        idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
        wait_for(lambda: asked(idle, environment).strip() == str(len(NODES)), "two idle nodes", 60)
        yield environment


def munge(folder: Path) -> list[str]:
    """What authenticates, with a key and a socket of its own."""
    key = folder / "munge.key"
    key.unlink(missing_ok=True)
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    own = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={folder}/munge.{name}" for option, name in own.items()]
    return ["munged", "--foreground", "--force", f"--key-file={key}", *files]


@contextmanager
def daemon(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A program that runs inside the block."""
    with (folder / "daemons.log").open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def named(nodes: tuple[str, ...]) -> Iterator[None]:
    """Inside the block the nodes' names are this machine's too, as a cluster's own would be known."""
    file = Path("/etc/hosts")
    before = file.read_text()
    file.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(nodes)}\n")
    try:
        yield
    finally:
        file.write_text(before)


def asked(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout


def submitted(out: Path, environment: dict[str, str]) -> str:
    """The number of a run's job, which `diffusion-kit launch` has queued."""
    runs.finish(out, **environment)
    found = re.search(r"Submitted batch job (\d+)", runs.log(out).read_text())
    need(found is not None, f"sbatch gave no job: {said(out)}")
    assert found is not None
    return found[1]


def over(job: str, out: Path, environment: dict[str, str]) -> dict[str, str]:
    """Waits for the end of a job; what SLURM says of it."""

    def state() -> dict[str, str] | None:
        found = dict(re.findall(r"(\w+)=(\S+)", asked(["scontrol", "show", "job", job], environment)))
        return found if found.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT") else None

    found = wait_for(state, f"job {job}")
    output = runs.WORK / f"{out.name}-{job}.out"
    need(found["JobState"] == "COMPLETED", f"job {job} {found['JobState']}\n{output.read_text()[-4000:]}")
    return found


def run(name: str) -> Path:
    return new(name, launch={"on": "slurm", "machines": 2, "processes": 1, "slurm": {"cpus": 1, "time": "1:00:00"}})


def slurm() -> dict[str, Any]:
    """A job of two nodes has the bits of two processes of torch's launcher."""
    with cluster() as environment:
        out = run("slurm")
        over(submitted(out, environment), out, environment)
        version = asked(["sbatch", "--version"], environment).strip()
    need(runs.processes(out) == 2, "two nodes did not join")
    return {"version": version, "nodes": len(NODES), "same bits": must_be_same(trained("two", 2), out)}


def slurm_told() -> dict[str, Any]:
    """A job that gets the signal that its script asks for before its end saves, is queued again, and ends with the same
    bits."""
    with cluster() as environment:
        return interrupted("slurm-told", ["scancel", "--batch", "--signal=USR1"], environment)


def slurm_requeue() -> dict[str, Any]:
    """A job that SLURM takes its nodes from, as at pre-emption, saves, waits in the queue, and ends with the same bits."""
    with cluster() as environment:
        return interrupted("slurm-requeued", ["scontrol", "requeue"], environment)


def interrupted(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """A run whose job gets a command after its third step."""
    out = run(name)
    job = submitted(out, environment)
    wait_for_step(out, 3)
    asked([*command, job], environment)
    found = over(job, out, environment)
    need(found["Restarts"] == "1", f"job {job} was queued again {found['Restarts']} times")
    lines = (runs.WORK / f"{name}-{job}.out").read_text().splitlines()
    own = [line.partition(";")[0] for line in lines if line.startswith(("stopped at step", "goes on at step"))]
    need(len(own) == 2, f"it did not save and go on: {own}")
    return {"by": " ".join(command), "lines": own, "same bits": must_be_same(trained("two", 2), out)}
