"""One machine: torch's elastic launcher, its restarts, stops, other numbers of processes, and folders of a run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import runs
from .runs import STEPS, TWO, finish, must_be_near, must_be_same, need, new, said, start, trained, wait_for_step


def local() -> dict[str, Any]:
    """Two processes with half of the batch each learn what one learns; a run of another seed is found to differ."""
    one, two = trained("one", 1), trained("two", 2)
    need((runs.processes(one), runs.processes(two)) == (1, 2), "not the processes that were asked for")
    other = runs.apart(two, finish(new("seed", seed=1), *TWO))
    need(other > runs.NEAR, f"the comparison cannot fail: another seed is {other:.2e} away")
    return {"apart": must_be_near(one, two), "another seed apart": other}


def restart() -> dict[str, Any]:
    """One of two processes is killed after a checkpoint: the launcher starts both again, and the run ends with its bits."""
    two, out = trained("two", 2), new("restart")
    process = start(out, *TWO, "launch.restarts=2")
    wait_for_step(out, STEPS // 2 + 1, process)
    victim = next(pid for pid in workers(process.pid) if runs.variables(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    runs.ended(out, process)
    again = [line for line in said(out) if line.startswith("goes on at step")]
    need(len(again) == 1, f"the run was not begun again once: {again}")
    return {"killed at step": STEPS // 2 + 1, "then": again[0], "same bits": must_be_same(two, out)}


def resume() -> dict[str, Any]:
    """A run of two processes stopped by SIGTERM and another stopped by Ctrl-C save, say so in a line, and go on with their
    bits."""
    figures: dict[str, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        out = new(f"stopped-{number.name}")
        process = start(out, *TWO)
        wait_for_step(out, 3, process)
        process.send_signal(number)
        runs.ended(out, process, 1)
        lines = said(out)[-2:]
        need(
            lines[0].startswith("stopped at step") and lines[1] == f"diffusion-kit: ended by {number.name}", str(lines)
        )
        need("Traceback" not in runs.log(out).read_text(), f"{out.name} ended in a traceback")
        finish(out, *TWO, "--resume")
        figures[number.name] = {"said": lines[0].partition(";")[0], "same bits": must_be_same(trained("two", 2), out)}
    return figures


def worlds() -> dict[str, Any]:
    """A checkpoint of two processes goes on in one, and one of one in two."""
    one, two = trained("one", 1), trained("two", 2)
    figures = {}
    for source, count in ((two, 1), (one, 2)):
        out = new(f"to-{count}")
        half(source, out)
        finish(out, f"launch.processes={count}", "--resume")
        need(runs.processes(out) == count, f"{out.name} did not run in {count}")
        need(any(line == f"goes on at step {STEPS // 2} of {STEPS}" for line in said(out)), f"{out.name} began anew")
        figures[f"{3 - count} to {count}"] = must_be_near(source, out)
    return figures


def half(source: Path, out: Path) -> None:
    """What was in a run's folder when half of its steps were made."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("result", ".*"))
    for folder in (out / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > STEPS // 2:
            shutil.rmtree(folder)


def folder() -> dict[str, Any]:
    """Of two runs that are started at once into one folder, one trains and the other is refused in one line."""
    out = new("shared")
    both = [out, out.with_name("shared-2")]
    runs.log(both[1]).unlink(missing_ok=True)
    shutil.copy(out.with_suffix(".yaml"), both[1].with_suffix(".yaml"))
    processes = [start(each, *TWO) for each in both]
    codes = [process.wait(runs.PATIENCE) for process in processes]
    need(sorted(codes) == [0, 2], f"exit codes {codes}")
    lines = [line for line in said(both[codes.index(2)]) if not line.startswith("There are modules")]
    told = ("is being written by another run", "holds a run already")  # which it is by then, on a busy machine
    need(len(lines) == 1 and any(part in lines[0] for part in told), f"not refused in one line: {lines}")
    return {"refused": lines[0].replace(f"{runs.ROOT}/", ""), "same bits": must_be_same(trained("two", 2), out)}


def workers(pid: int) -> list[int]:
    """Children of a process."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def accelerate_trap() -> dict[str, Any]:
    """`accelerate launch --cpu --num_processes 2` starts one process: it stops before its first step, with a line."""
    figures = {}
    for name, more in {"as launch says": {"DIFFUSION_KIT_PROCESSES": "2"}, "as the configuration says": {}}.items():
        out = new("trap", **({} if more else {"launch": {"processes": 2}}))
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        command = [*accelerate, "-m", "diffusion_kit.cli", "train", str(out.with_suffix(".yaml"))]
        done = subprocess.run(
            command, cwd=runs.WORK, env=runs.environment(more), capture_output=True, text=True, timeout=runs.PATIENCE
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("diffusion-kit: ")]
        need(done.returncode != 0 and not (out / "metrics.jsonl").exists(), f"it trained: {done.stdout[-2000:]}")
        need(len(lines) == 1 and "2 processes were asked for" in lines[0], done.stderr[-2000:])
        figures[name] = lines[0]
    return figures
