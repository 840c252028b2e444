"""A batch script of SLURM: torch's launcher once on each machine; a run that is pre-empted saves and is queued again."""

from __future__ import annotations

import shlex
from pathlib import Path

from . import local
from .job import Job
from .process import Process


def build(job: Job) -> Process:
    output = Path(job.config.output)
    file = output.with_name(f"{output.name}.sbatch")
    return Process(("sbatch", str(file)), files={file: script(job)})


def script(job: Job) -> str:
    """One script a run: it is queued again, and goes on, until the training has ended."""
    launch, own = job.launch, job.launch.slurm
    count = str(launch.processes or own.gpus or 1)
    name = own.job or Path(job.config.output).name
    lines = {
        "job-name": name,
        "nodes": launch.machines,
        "ntasks-per-node": 1,  # torch's launcher, which starts the processes
        "cpus-per-task": own.cpus,
        "gres": f"gpu:{own.gpus}" if own.gpus else None,
        "time": own.time,
        "partition": own.partition,
        "account": own.account,
        "output": f"{name}-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{own.warning}" if own.warning else None,
    }
    head = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in lines.items() if value is not None)]
    head += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in own.options)]
    environment = job.environment(int(count))
    if own.cpus:
        environment["OMP_NUM_THREADS"] = str(job.config.threads or max(1, own.cpus // int(count)))
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    start = local.elastic(launch, count, "$SLURM_NODEID", "$MASTER_ADDR")
    command = shlex.join([*start, *job.module()]).replace("'$SLURM_NODEID'", "$SLURM_NODEID")
    command = command.replace("'$MASTER_ADDR'", "$MASTER_ADDR")
    cpus = f" --cpus-per-task={own.cpus}" if own.cpus else ""  # which srun does not take from the job
    body = BODY.format(cpus=cpus, command=shlex.quote(f"exec {command} $RESUME"))
    return "\n".join([*head, *own.setup, *exports, body])


BODY = """\
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RESUME=
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && RESUME=--resume

srun --kill-on-bad-exit=1{cpus} bash -c {command} &
run=$!
trap 'told=1; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1 TERM
wait $run; code=$?
while kill -0 $run 2>/dev/null; do wait $run; code=$?; done  # a signal ends a wait, not the run
[ -n "$told" ] && [ $code -ne 0 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
