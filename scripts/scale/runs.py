"""Trainings of a small random base, and comparisons of what they learned, for the parts of scripts/verify_scale.py."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "outputs" / "scale"
STEPS, EVERY = 8, 2  # steps in all, and between checkpoints
NEAR = 1e-3  # of how far weights moved: two processes and one differ by rounding
PATIENCE = 1500  # seconds for one training, on a busy machine
COMMON: dict[str, Any] = {
    "target": "controlnet",
    "steps": STEPS,
    "batch": 4,
    "micro_batch": 1,
    "ema": 0.9,
    "threads": 1,
    "log_every": 1,
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
    "checkpoints": {"every": EVERY, "keep": STEPS},
}
TWO = ("launch.processes=2",)


def need(fact: bool, told: str) -> None:
    """Ends the script where a promise does not hold."""
    if not fact:
        sys.exit(told)


def commit(what: str = "HEAD") -> str:
    done = subprocess.run(["git", "rev-parse", "--short", what], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# Folders


def prepared() -> Path:
    """Base and pictures, made once."""
    if not (WORK / "data").is_dir():
        sys.path.insert(0, str(ROOT / "tests"))
        import training_models

        shutil.copytree(training_models.base(), WORK / "base", dirs_exist_ok=True)
        shutil.copytree(training_models.data(14), WORK / "data.part", dirs_exist_ok=True)
        (WORK / "data.part").rename(WORK / "data")
    return WORK


def new(name: str, **more: Any) -> Path:
    """The folder of a run that is not there yet, its configuration beside it; `more` is put over the common one."""
    out = prepared() / name
    shutil.rmtree(out, ignore_errors=True)
    log(out).unlink(missing_ok=True)
    data = {"sources": [{"path": str(WORK / "data")}], "resolution": 64, "workers": 1}
    tree: dict[str, Any] = {**COMMON, "output": str(out), "base": {"model": str(WORK / "base")}, "data": data}
    for key, value in more.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    out.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
    return out


def log(out: Path) -> Path:
    return out.with_suffix(".log")


def said(out: Path) -> list[str]:
    """Lines that a run wrote, without bars of progress."""
    text = log(out).read_text() if log(out).is_file() else ""
    return [line for line in text.splitlines() if line.strip() and "it/s" not in line and "\r" not in line]


# Processes


def environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def started(out: Path, command: list[str], more: Mapping[str, str]) -> subprocess.Popen:
    with log(out).open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=WORK, env=environment(more))


def start(out: Path, *arguments: str, python: str = sys.executable, **more: str) -> subprocess.Popen:
    """`diffusion-kit launch` of a run, from a folder that is not the kit's; `more` is put into its environment."""
    command = [python, "-m", "diffusion_kit.cli", "launch", str(out.with_suffix(".yaml")), *arguments]
    return started(out, command, more)


def ended(out: Path, process: subprocess.Popen, code: int = 0) -> None:
    """Waits for the end of a run, which must be this one."""
    try:
        found = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        found = None
    need(found == code, f"{out.name}: exit code {found}, not {code}\n" + "\n".join(said(out)[-40:]))


def finish(out: Path, *arguments: str, python: str = sys.executable, **more: str) -> Path:
    ended(out, start(out, *arguments, python=python, **more))
    return out


def wait_for(what: Any, told: str, seconds: float = PATIENCE) -> Any:
    """The first answer that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        need(time.monotonic() < end, f"waited {seconds} s for {told}")
        time.sleep(0.1)
    return found


def wait_for_step(out: Path, step: int, process: subprocess.Popen | None = None) -> None:
    def reached() -> bool:
        need(process is None or process.poll() is None, f"{out.name} ended too soon\n" + "\n".join(said(out)[-40:]))
        return last_step(out) >= step

    wait_for(reached, f"step {step} of {out.name}")


def last_step(out: Path) -> int:
    file = out / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in file.read_text().splitlines()), default=0) if file.is_file() else 0


def variables(pid: int) -> dict[str, str]:
    """The environment of a process; nothing of one that has ended."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def given(out: Path, name: str) -> dict[str, str | None]:
    """What a variable of the environment is in every process that trains a run, by its rank."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        own = variables(int(file.parent.name))
        rank = own.get("RANK") or own.get("OMPI_COMM_WORLD_RANK")
        if rank is not None and str(out.with_suffix(".yaml")) in file.read_text().split("\0"):
            found[rank] = own.get(name)
    return found


def trained(name: str, processes: int, **more: Any) -> Path:
    """An undisturbed run by torch's launcher, made once for each state of the package."""
    out = WORK / f"{name}-{commit('HEAD:diffusion_kit')}"
    if not (out / "result").is_dir():
        finish(new(out.name, **more), f"launch.processes={processes}")
    return out


# Comparison


def kept(out: Path, step: int = STEPS, part: str = "weights") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


def apart(own: Path, other: Path) -> float:
    """How far the last weights of two runs are apart, against how far they moved since the first checkpoint."""
    start, a, b = kept(own, EVERY), kept(own), kept(other)
    need(a.keys() == b.keys(), f"{own.name} and {other.name} hold other tensors")
    gap = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    way = sum(float((a[name].double() - start[name].double()).square().sum()) for name in a)
    return (gap / way) ** 0.5


def differing(own: Path, other: Path) -> list[str]:
    """What is not bit for bit the same at the end of two runs."""
    folders = [out / "checkpoints" / f"step-{STEPS:08d}" for out in (own, other)]
    names = [f"{part}.safetensors" for part in ("weights", "ema", "optimizer")]
    found = [name for name in names if len({(folder / name).read_bytes() for folder in folders}) > 1]
    return found + ["metrics"] * ((own / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes())


def must_be_near(own: Path, other: Path) -> float:
    gap = apart(own, other)
    need(gap < NEAR, f"{other.name} is {gap:.2e} of their way from {own.name}; {NEAR} is allowed")
    return gap


def must_be_same(own: Path, other: Path) -> bool:
    found = differing(own, other)
    need(not found, f"{other.name} has not the bits of {own.name}: {', '.join(found)}, {apart(own, other):.2e} apart")
    return True


def processes(out: Path) -> int:
    """How many wrote the last checkpoint."""
    state = json.loads((out / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    return state["environment"]["processes"]


# What stands for other machines


def stand_in_for_ssh(folder: Path) -> Path:
    """A program `ssh` that runs its command here, in an empty environment as on another machine, and notes the host."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ssh"
    file.write_text(SSH.format(log=folder / "hosts"))
    file.chmod(0o755)
    (folder / "hosts").unlink(missing_ok=True)
    return file


SSH = """\
#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in -o|-p|-l|-i|-F) shift 2 ;; *) shift ;; esac
done
echo "$1" >> {log}
shift
exec env -i HOME="$HOME" PATH="/usr/local/bin:/usr/bin:/bin" bash -c "cd; $*"
"""


def hosts_asked(folder: Path) -> list[str]:
    file = folder / "hosts"
    return sorted(set(file.read_text().split())) if file.is_file() else []


def installed(program: str, package: str) -> None:
    """Installs a package of Debian's, if a program, or a file, of it is not there."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None and not Path(program).is_file():
        command = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {package}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        need(done.returncode == 0, f"{command}\n{done.stderr[-2000:]}")


def python_with(package: str, wanted: str) -> str:
    """A Python that has a package: this one, or one of a folder of its own, which sees all that this one has."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    folder = WORK / f"python-{package}"
    python = folder / "bin" / "python"
    if not (folder / "whole").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        seen = [path for path in sys.path if path.endswith("site-packages")]
        (next(folder.glob("lib/*/site-packages")) / "seen.pth").write_text("".join(f"{path}\n" for path in seen))
        pip = [str(python), "-m", "pip", "install", "-q", wanted]
        subprocess.run(pip, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
        (folder / "whole").touch()
    return str(python)
