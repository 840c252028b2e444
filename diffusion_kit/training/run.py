"""A run: its folder, its log, its checkpoints, and how it begins, goes on and ends.

OUTPUT/config.yaml          the whole configuration
OUTPUT/run.json             what it is called in the history
OUTPUT/metrics.jsonl        what was measured; the same in every run of the configuration
OUTPUT/timing.jsonl         how fast it was
OUTPUT/checkpoints/         where it can go on
OUTPUT/result/              what diffusers loads, written at the end
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from diffusion_kit.recipes.whole import write_whole

from . import checkpoints
from .config import Config, parse, read
from .tree import leaves

if TYPE_CHECKING:
    from .tracking import Trackers

LOGS = ("metrics", "timing")
ASKED = ".asked"  # file of a run for what it is to do after the step at hand
REQUESTS = ("save", "validate", "stop")
LAUNCHER = ".launcher"  # file of a run that says who started it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# What a run may change without being another: places, and how long it lasts and what it keeps.
FREE = {
    *("output", "steps", "checkpoints", "validation", "log_every", "license", "data.workers", "threads"),
    *("trackers", "history"),
    *("deepspeed", "base.spread", "launch"),  # which share the same step in another way
    *("cache.folder", "cache.latents", "cache.text", "cache.conditions"),
}
FIXED = {"target", "optimizer.name"}  # what no run can change


@dataclass
class Run:
    """The folder of a run.

    Attributes:
        main: whether this process speaks, keeps the log, validates and writes the result; one does.
        writes: whether it writes checkpoints: the same process, or one on each machine.
        trackers: who else is told what is logged.
    """

    folder: Path
    main: bool = True
    writes: bool = True
    trackers: Trackers | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(line)
            sys.stdout.flush()

    def log(self, name: str, row: dict[str, Any]) -> None:
        """Adds a line to `metrics` or `timing`."""
        if self.main:
            with (self.folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.main and self.trackers is not None:
            self.trackers.log(row)

    def asked(self) -> set[str]:
        """What somebody asked of this run since, with `ask`; it is asked no more."""
        file = self.folder / ASKED
        if not (self.main and file.is_file()):
            return set()
        taken = file.with_name(f"{ASKED}.taken")  # what is asked from now on is for the next step
        os.replace(file, taken)
        found = set(taken.read_text().split())
        taken.unlink()
        return found

    def validations(self) -> dict[int, dict[str, float]]:
        """Figures of every validation so far, by its step."""
        file = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return {row["step"]: row["validation"] for row in rows if "validation" in row}

    def best(self) -> int | None:
        """The step of the validation with the most fidelity."""
        found = {step: figures.get("fidelity", math.nan) for step, figures in self.validations().items()}
        return max((step for step in found if not math.isnan(found[step])), key=lambda step: found[step], default=None)

    def cut_logs(self, step: int) -> None:
        """Drops lines of steps after the one from which the run goes on."""
        for file in (self.folder / f"{name}.jsonl" for name in LOGS):
            if not file.is_file():
                continue
            lines = [line for line in file.read_text().splitlines() if _step(line) <= step]
            write_whole(file, "".join(line + "\n" for line in lines).encode())


def ask(folder: Path, what: str) -> None:
    """Asks a run, in whatever process or machine it is, for a checkpoint, a validation, or to stop.

    Raises:
        ValueError: something else, or a folder of no run.
    """
    if what not in REQUESTS:
        raise ValueError(f"a run can be asked to {', '.join(REQUESTS)}, not to {what}")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run")
    with (folder / ASKED).open("a") as file:
        file.write(f"{what}\n")


def _step(line: str) -> float:
    """Of a line of a log; one that was cut short belongs to no step that counts."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The lock is this process's alone: loader workers, which outlive a SIGKILL by seconds, do not hold it.

    Raises:
        ValueError: another process writes this run, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"output {folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"output {folder} is being written by another run: give another folder") from None
    try:
        yield
    finally:
        lock.close()


def begin(config: Config, resume: bool, allow: Sequence[str]) -> None:
    """Checks that the folder and the configuration belong to each other, and writes the configuration there.

    Raises:
        ValueError: the folder holds a run and `resume` was not said, or another configuration's.
    """
    folder = Path(config.output)
    root, file = folder / "checkpoints", folder / "config.yaml"
    found = checkpoints.whole(root)
    if resume and not found and (broken := sorted(root.glob("step-*"))):
        told = f"no checkpoint in {root} is whole, {broken[-1].name} has not all its files"
        raise ValueError(f"{told}: give them back, or remove it to begin anew")
    if not found and file.is_file() and not written(file):
        raise ValueError(f"{file} was written by no run, and would be replaced: give another output")
    if resume and found and not file.is_file():
        raise ValueError(f"output {folder} has checkpoints and no config.yaml, which says of what run: give it back")
    if resume and not found and (folder / "result").exists():
        raise ValueError(
            f"output {folder} has a result and no checkpoint: give another folder, or remove it to begin anew"
        )
    if resume and file.is_file():
        check_same(read(file), config, allow, found[-1] if found else None)
    elif found or (folder / "result").exists():
        raise ValueError(f"output {folder} holds a run already: add --resume to go on with it, or give another folder")
    (folder / ASKED).unlink(missing_ok=True)
    if (own := launcher()) is not None:
        (folder / LAUNCHER).write_text(own)
    write_whole(file, config.dump().encode())


def newest(root: Path, in_all: Callable[[list[int]], list[list[int]]]) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint that every process finds; None where none of them finds any.

    Args:
        in_all: the steps that each process found.

    Raises:
        ValueError: they have none in common.
    """
    found = in_all([checkpoints.step_of(folder) for folder in checkpoints.whole(root)])
    common = set.intersection(*map(set, found))
    if not common and any(found):
        raise ValueError(f"{root} holds no checkpoint that all machines have: see checkpoints.each_machine")
    return checkpoints.read(checkpoints.folder_of(root, max(common))) if common else None


def launcher() -> str | None:
    """Names torch's launcher, if it started this process, as its parent: the same for those that it starts again."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{socket.gethostname()} {os.getppid()} {run}"


def restarted(folder: Path) -> bool:
    """Whether this process stands for one that died in this run. One that was refused was never in it: whoever is
    started in its place is refused too."""
    file = folder / LAUNCHER
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and file.is_file() and file.read_text() == launcher()


def written(file: Path) -> bool:
    """Whether a configuration is as a run writes it, so that nothing is lost with it."""
    try:
        text = file.read_text()
        return parse(yaml.safe_load(text), str(file)).dump() == text
    except (ValueError, yaml.YAMLError):
        return False


def settled(config: Config, resume: bool) -> Config:
    """The configuration with the numbers that a run found for itself when it began."""
    file = Path(config.output) / "config.yaml"
    if not (resume and config.batch == "auto" and file.is_file()):
        return config
    old = read(file)
    return config.model_copy(update={"batch": old.batch, "micro_batch": old.micro_batch})


def check_same(old: Config, new: Config, allow: Sequence[str], checkpoint: Path | None) -> None:
    """
    Raises:
        ValueError: a value that shapes the run is another one, and was not allowed.
    """
    before, after = (dict(leaves(config.model_dump(mode="json"))) for config in (old, new))
    for key in {**before, **after}:
        free = any(key == name or key.startswith(f"{name}.") for name in (*FREE, *allow))
        if before.get(key) != after.get(key) and key in FIXED:
            raise ValueError(
                f"{key} is {after.get(key)!r}, the run of {old.output} has {before.get(key)!r}: begin a new run"
            )
        if before.get(key) != after.get(key) and not free:
            where = f"{checkpoint or old.output}"
            raise ValueError(
                f"{key} is {after.get(key)!r}, the run of {where} has {before.get(key)!r}: "
                f"leave it, or allow the change with --allow-change {key}"
            )


def environment(processes: int) -> dict[str, Any]:
    """What a run's bits depend on beside its configuration."""
    import accelerate
    import diffusers
    import transformers

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the environment is another than when the checkpoint was written, a line each."""
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]


class Stopped(BaseException):
    """A signal came before the first step, when there is nothing to finish and to save. Nobody takes it for an error."""


@dataclass
class Signals:
    """Asks a run to stop: after the step at hand where it is `stepping`, else at once. Signals that the process was
    started to ignore (nohup) it goes on ignoring."""

    say: Callable[[str], None] = print
    received: int | None = None
    stepping: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other hears signals
            heard = (number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        again, self.received = self.received is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        if not again and not self.stepping:
            raise Stopped
        if not again:
            self.say("stops after this step; a second Ctrl-C does not wait for it")

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """What is made inside the block again, later, is broken off by a signal."""
        self.stepping = False
        try:
            yield
        except Stopped:
            pass
        finally:
            self.stepping = True


def resume_command(arguments: Sequence[str]) -> str:
    """The command line again, with --resume."""
    parts = [part for part in arguments if part != "--resume"]
    if not parts:
        return "train(config, resume=True)"
    if "DIFFUSION_KIT_PROCESSES" in os.environ:  # which `diffusion-kit launch` says
        return shlex.join(["launch" if part == "train" else part for part in parts[:2]] + [*parts[2:], "--resume"])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parts[:1] = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], "-m", "diffusion_kit.cli"]
    return shlex.join([*parts, "--resume"])


@dataclass
class Clock:
    """Pictures a second and time left, of the steps since the process began."""

    steps: int
    batch: int
    first: int
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.start = self.last = self.now()
        self.last_step = self.first

    def row(self, step: int) -> dict[str, float]:
        now = self.now()
        rate = (step - self.last_step) / max(now - self.last, 1e-9)
        whole = (step - self.first) / max(now - self.start, 1e-9)
        self.last, self.last_step = now, step
        left = (self.steps - step) / max(whole, 1e-9)
        return {"images_per_second": rate * self.batch, "seconds_left": left}
