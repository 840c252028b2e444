"""Runs that are killed at every kind of moment end with the bits of runs that nobody disturbed.

python scripts/verify_resume.py [--json]

Three runs of `diffusion-kit train` on a small random base: float32 without and with a cache, and bfloat16. Each is done
once undisturbed and once under SIGKILLs, each followed by `--resume`: some where the process kills itself at the n-th call
of a function, some at a random time from outside. Then two runs that must differ, to show that the comparison can fail.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "diffusion_kit.training"
STEPS, EVERY = 24, 3  # steps in all, and between checkpoints
LATE = (5, 0.3)  # steps, and seconds after them, by which a kill from outside has come
LANES = 2  # runs at once, on one thread each
COMMON: dict[str, Any] = {
    "target": "t2i_adapter",
    "steps": STEPS,
    "batch": 4,
    "micro_batch": 2,
    "ema": 0.9,
    "threads": 1,
    "log_every": 1,
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
    "dropout": {"caption": 0.3, "condition": 0.3, "zeros": 0.5},
    "checkpoints": {"every": EVERY, "keep": 2},
    "validation": {"every": 2 * EVERY, "pictures": 2, "steps": 2},
}
DATA: dict[str, Any] = {
    "resolution": 64,
    "buckets": 2,
    "bucket_step": 16,
    "crop": "random",
    "crops": 3,
    "flip": 0.5,
    "holdout": 2,
    "workers": 2,
    "condition": {"detector": "canny"},
}


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the `call`-th call of a function since the process began, before it or behind it; without one, at a time.

    Attributes:
        told: where that is.
        kind: "checkpoint", "prune", "accumulation", "validation" or another.
        of: what the call's arguments must name to count.
        half: the file that the call wrote is cut in half.
    """

    told: str
    kind: str
    function: str = ""
    call: int = 1
    of: str = ""
    behind: bool = False
    half: bool = False


BACKWARD = f"{TRAINING}.parallel.replicated:Replicated.backward"
SAVE, SYNC = f"{TRAINING}.checkpoints:save_file", f"{TRAINING}.checkpoints:sync"
# A checkpoint is three files of tensors and six syncs (four files, manifest, folder); the seventh is its parent's.
RUNS: dict[str, tuple[dict[str, Any], tuple[Kill, ...]]] = {
    "float32": (
        {},
        (
            Kill(
                "between two micro-batches",
                "accumulation",
                BACKWARD,
                9,
                behind=True,
            ),
            Kill("weights written, the average's file half", "checkpoint", SAVE, 2, half=True, behind=True),
            Kill("manifest written, folder not renamed", "checkpoint", SYNC, 6),
            Kill("validation, second group of pictures", "validation", f"{TRAINING}.validation:show", 2),
            Kill("pruning, before the files are removed", "prune", "shutil:rmtree", of="step-00000003"),
            Kill("at a random time", "outside"),
        ),
    ),
    "float32, cache": (
        {"cache": {"folder": "cache"}},
        (
            Kill("filling the cache, between two shards", "cache", f"{TRAINING}.data.store:save_file", 2),
            Kill("weights stepped, average not", "update", f"{TRAINING}.ema:Average.update", 5),
            Kill("files written, no manifest", "checkpoint", f"{TRAINING}.checkpoints:seal"),
            Kill("checkpoint renamed, not synced, not pruned", "checkpoint", SYNC, 7),
            Kill("at a random time", "outside"),
        ),
    ),
    "bfloat16": (
        {"precision": "bf16"},
        (
            Kill("moments' file half", "checkpoint", SAVE, 3, half=True, behind=True),
            Kill("resuming, before the log is cut", "resume", "os:replace", of="metrics.part"),
            Kill(
                "validation, while pictures are measured",
                "validation",
                f"{TRAINING}.validation:evaluate",
                2,
                behind=True,
            ),
            Kill("at a random time", "outside"),
            Kill("result written, not renamed", "end", f"{TRAINING}.card:write", behind=True),
        ),
    ),
}
OTHERS: dict[str, dict[str, Any]] = {"seed": {"seed": 1}, "schedule": {"optimizer": {"warmup_steps": 1}}}


# The process that trains


def worker(out: Path, kill: dict[str, Any] | None, arguments: list[str]) -> None:
    """`diffusion-kit train` that lists the samples of each step, and kills itself where it was told to."""
    from diffusion_kit import cli
    from diffusion_kit.training.loop import Trainer

    learn = Trainer.learn

    def listed(trainer: Trainer, batches: list[Any]) -> None:
        row = {"step": trainer.step, "samples": [sample_of(own) for batch in batches for own in batch.samples]}
        with out.with_suffix(".samples").open("a") as file:
            file.write(json.dumps(row) + "\n")
        learn(trainer, batches)

    Trainer.learn = listed  # type: ignore[method-assign, assignment]
    if kill is not None:
        arm(Kill(**kill))
    sys.exit(cli.main(["train", *arguments]))


def sample_of(sample: Any) -> list[Any]:
    """Name, place and caption of a sample, and a digest of what the network sees."""
    seen = hashlib.sha256()
    for value in (sample.pixels, sample.moments, sample.condition, sample.time_ids, *(sample.text or {}).values()):
        seen.update(b"" if value is None else value.contiguous().numpy().tobytes())
    return [sample.name, *sample.place, sample.caption, sample.zeros, seen.hexdigest()[:16]]


def arm(kill: Kill) -> None:
    """Puts a function that ends the process in the place of another."""
    module, _, name = kill.function.partition(":")
    *holders, last = name.split(".")
    holder: Any = importlib.import_module(module)
    for part in holders:
        holder = getattr(holder, part)
    function, count = getattr(holder, last), 0

    def deadly(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += kill.of in str(args)
        if count != kill.call or kill.of not in str(args):
            return function(*args, **more)
        if kill.behind:
            function(*args, **more)
        if kill.half:
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived SIGKILL")

    setattr(holder, last, deadly)


# The process that watches


def prepare(folder: Path) -> None:
    """A base and pictures of several shapes."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    import training_models

    shutil.copytree(training_models.base(), folder / "base")
    (folder / "data").mkdir()
    rows = []
    for k in range(14):
        size = [(80, 80), (64, 128), (130, 70)][k % 3]
        conftest.picture(k, 128).resize(size).save(folder / "data" / f"{k}.png")
        rows.append({"image": f"{k}.png", "text": [f"a {k}", f"picture {k}"]})
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_config(out: Path, more: dict[str, Any]) -> None:
    """A configuration; `more` is put over it, dicts into dicts. Every run has a cache of its own."""
    data = {**DATA, "sources": [{"path": str(out.parent / "data")}]}
    tree: dict[str, Any] = {**COMMON, "output": str(out), "base": {"model": str(out.parent / "base")}, "data": data}
    for name, value in more.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    if "cache" in tree:
        tree["cache"] = {"folder": f"{out}-cache"}
    out.with_suffix(".yaml").write_text(yaml.safe_dump(tree))


def start(out: Path, *flags: str, kill: Kill | None = None) -> subprocess.Popen:
    armed = json.dumps(None if kill is None else vars(kill))
    command = [sys.executable, __file__, "worker", str(out), armed, str(out.with_suffix(".yaml")), *flags]
    with out.with_suffix(".log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(out: Path, *flags: str) -> None:
    if start(out, *flags).wait():
        sys.exit(f"{out.name} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")


def killed(out: Path, kill: Kill, rng: random.Random, *flags: str) -> dict[str, Any]:
    """Lets a run come to its end; where that was."""
    before = steps_logged(out)
    process = start(out, *flags, kill=kill if kill.function else None)
    if not kill.function:
        outside(out, process, rng, before)
    code = process.wait()
    if code != -signal.SIGKILL:
        sys.exit(f"{kill.told}: exit code {code}, not killed\n{out.with_suffix('.log').read_text()[-3000:]}")
    return {"where": kill.told, "kind": kill.kind, "steps made": last_step(out), "goes on at": newest(out)}


def outside(out: Path, process: subprocess.Popen, rng: random.Random, before: int) -> None:
    """Kills a process some time after one of its first steps."""
    steps = rng.randint(1, LATE[0])
    while process.poll() is None and steps_logged(out) < before + steps:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, LATE[1]))
    process.kill()


def steps_logged(out: Path) -> int:
    file = out.with_suffix(".samples")
    return len(file.read_text().splitlines()) if file.is_file() else 0


def last_step(out: Path) -> int:
    file = out / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in file.read_text().splitlines()), default=0) if file.is_file() else 0


def newest(out: Path) -> int:
    """Step of the newest whole checkpoint."""
    whole = [file.parent.name for file in (out / "checkpoints").glob("step-*/COMPLETE.json")]
    return max((int(name.removeprefix("step-")) for name in whole), default=0)


# Comparison


UNLIKE = {"config.yaml", "training.yaml", "README.md", "timing.jsonl"}  # name the run's folder, or tell the time


def content(out: Path) -> dict[str, Any]:
    """What two runs must have in common, by name: the samples of every attempt at a step, all files of the folder."""
    final = out / "checkpoints" / f"step-{STEPS:08d}"
    state = json.loads((final / "state.json").read_text())
    metrics = (out / "metrics.jsonl").read_text()
    rates = [row.get("learning_rate") for row in map(json.loads, metrics.splitlines())]
    samples: dict[int, set[str]] = {}
    for row in map(json.loads, out.with_suffix(".samples").read_text().splitlines()):
        samples.setdefault(row["step"], set()).add(json.dumps(row["samples"]))
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in UNLIKE)
    return {
        **{name: (final / f"{name}.safetensors").read_bytes() for name in ("weights", "ema", "optimizer")},
        "state": state,
        "learning rates": [rates, [group["lr"] for group in state["optimizer"]["groups"]]],
        "metrics": metrics,
        "samples": samples,
        "files": {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def equal(a: dict[str, Any], b: dict[str, Any]) -> dict[str, bool]:
    return {name: a[name] == b[name] for name in a}


def verify_run(folder: Path, name: str) -> dict[str, Any]:
    (more, kills), rng = RUNS[name], random.Random(name)
    key = name.replace(", ", "-")
    calm, hunted = folder / key, folder / f"{key}-killed"
    for out in (calm, hunted):
        write_config(out, more)
    finish(calm)
    landed = [killed(hunted, kill, rng, *(["--resume"] if k else [])) for k, kill in enumerate(kills)]
    finish(hunted, "--resume")
    a, b = content(calm), content(hunted)
    same = equal(a, b)
    if not all(same.values()):
        files = sorted(file for file, _ in a["files"].items() ^ b["files"].items())
        sys.exit(f"{name}: not the bits of the undisturbed run: {same}; files {files}")
    return {"settings": more, "kills": landed, "equal": same, "environment": a["state"]["environment"]}


def verify_other(folder: Path, name: str) -> dict[str, bool]:
    """What is equal in a run of another setting."""
    out = folder / name
    write_config(out, OTHERS[name])
    finish(out)
    return equal(content(folder / next(iter(RUNS))), content(out))


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(LANES) as lanes:
        folder = Path(made)
        prepare(folder)
        runs = dict(zip(RUNS, lanes.map(partial(verify_run, folder), RUNS), strict=True))
        others = dict(zip(OTHERS, lanes.map(partial(verify_other, folder), OTHERS), strict=True))
    blind = [part for part in next(iter(others.values())) if all(own[part] for own in others.values())]
    if blind:
        sys.exit(f"these comparisons cannot fail: {', '.join(blind)}")
    kinds = [kill["kind"] for run in runs.values() for kill in run["kills"]]
    figures = {
        "kills": {"together": len(kinds), **{kind: kinds.count(kind) for kind in sorted(set(kinds))}},
        "settings": {**COMMON, "data": DATA},
        "runs": runs,
        "equal to a run of another": others,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(figures, indent=None if "--json" in sys.argv else 1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:])
    else:
        main()
