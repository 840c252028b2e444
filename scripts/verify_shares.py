"""Caches and job files that are shared are those of one process: by workers of Ray, of which one is killed, by two
processes, and by two processes that spread the network (ZeRO inference).

python scripts/verify_shares.py [ray] [processes] [zero]     prints JSON

Each part runs the commands as a user would, in a folder of its own, with the embedded model. `ray` needs the package
ray[data], `zero` DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "diffusion_kit.cli"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PICTURES, STEPS = 192, "3"
PATIENCE = 1800  # seconds, until a command hangs
JOBS: list[dict[str, Any]] = [
    {"prompt": "a red apple on a blue background", "seed": 1},
    {"prompt": "a brown horse", "control": ["canny=horse.png,guidance=2"], "count": 3, "out": "horse.png"},
    {"prompt": "a yellow sun", "image": "horse.png", "strength": 0.7, "out": "sun.webp"},
    *({"prompt": f"a green tree {seed}", "seed": seed} for seed in range(2, 6)),
]
BAD = {"prompt": "a cat", "control": "cany=horse.png"}
UNEQUAL: list[dict[str, Any]] = [  # three on two processes, in no step of equal length
    {"prompt": "a red apple on a blue background", "seed": 1, "steps": 2},
    {"prompt": "a brown horse", "control": ["canny=horse.png,guidance=2"], "seed": 2, "steps": 5},
    {"prompt": "a red apple", "seed": 3, "guidance_scale": 1, "steps": 4},
]
CONFIG: dict[str, Any] = {
    "target": "t2i_adapter",
    "output": "run",
    "steps": 1,
    "base": {"model": "default"},
    "data": {
        "sources": [{"path": "data"}],
        "resolution": 64,
        "crop": "random",
        "crops": 2,
        "flip": 0.5,
        "workers": 0,
        "condition": {"detector": "canny"},
    },
}


# The commands


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **own, "PYTHONPATH": path}


def run(folder: Path, *arguments: str, launcher: list[str] | None = None, code: int = 0) -> dict[str, Any]:
    """Runs a command to its end; seconds and what it said."""
    start = time.monotonic()
    own = {"cwd": folder, "env": environment(), "text": True, "capture_output": True}
    done = subprocess.run([*(launcher or CLI), *arguments], timeout=PATIENCE, check=False, **own)
    if done.returncode != code:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}\nexit code {done.returncode}")
    return {"seconds": round(time.monotonic() - start, 1), "out": done.stdout, "err": done.stderr}


def struck(folder: Path, seen: Callable[[], bool], *arguments: str) -> dict[str, Any]:
    """Runs a command, and kills one of its workers, which is at work, when something is seen."""
    start = time.monotonic()
    own = {"cwd": folder, "env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*CLI, *arguments], **own) as process:  # type: ignore[call-overload]
        killed = None
        while killed is None and process.poll() is None and time.monotonic() - start < PATIENCE:
            killed = kill_one(folder) if seen() else None
            time.sleep(0.02)
        out, err = process.communicate(timeout=PATIENCE)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}\n{out[-2000:]}\n{err[-3000:]}\nexit code {process.returncode}")
    return {"seconds": round(time.monotonic() - start, 1), "out": out, "err": err, "killed": killed}


def kill_one(folder: Path) -> int | None:
    """SIGKILL to a worker of Ray that is at work in the folder."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            title = (place / "cmdline").read_bytes().decode(errors="replace")
            if "MapWorker" in title and ".submit" in title and (place / "cwd").resolve() == folder.resolve():
                os.kill(int(place.name), signal.SIGKILL)
                return int(place.name)
        except OSError:
            continue
    return None


def written(folder: Path, name: str, jobs: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return name


def prepare(folder: Path) -> None:
    (folder / "horse.png").write_bytes((ROOT / "examples" / "horse.png").read_bytes())


# Comparing


def files(folder: Path) -> dict[str, str]:
    """Names and content of pictures."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def entries(cache: Path) -> dict[str, str]:
    """What a cache holds, by store and key."""
    from diffusion_kit.training.data.store import Store

    found = {}
    for place in sorted(path for path in cache.iterdir() if path.is_dir()):
        store = Store(place)
        for key in store._places:
            values = sorted((store.get(key) or {}).items())
            content = b"".join(name.encode() + value.contiguous().numpy().tobytes() for name, value in values)
            found[f"{place.name}/{key}"] = hashlib.sha256(content).hexdigest()
    return found


# The parts


def ray_generate(folder: Path) -> dict[str, Any]:
    """A job file by two workers, of which one is killed after the first picture; then again, and with a bad line."""
    jobs, shared = written(folder, "jobs.jsonl", JOBS), ["--on", "ray", "--workers", "2", "--steps", STEPS]
    alone = run(folder, "generate", "--jobs", jobs, "--steps", STEPS, "--out", "alone")
    first: Callable[[], bool] = lambda: any(folder.glob("ray/[!.]*"))  # noqa: E731
    two = struck(folder, first, "generate", "--jobs", jobs, *shared, "--out", "ray")
    before = times(folder / "ray")
    worse = written(folder, "worse.jsonl", [*JOBS, BAD])
    again = run(folder, "generate", "--jobs", worse, *shared, "--out", "ray", code=2)
    lines = [line.replace("ray/", "alone/") for line in two["out"].splitlines()]
    return {
        "pictures": len(files(folder / "alone")),
        "killed": two["killed"],
        "seconds": {"alone": alone["seconds"], "two workers, one killed": two["seconds"], "again": again["seconds"]},
        "error of the bad line": again["err"].strip().splitlines(),
        "passed": {
            "a worker was killed": two["killed"] is not None,
            "the same files, byte for byte": files(folder / "ray") == files(folder / "alone"),
            "reported in order": lines == alone["out"].splitlines(),
            "nothing of Ray on the terminal": not two["err"].strip(),
            "the second run makes nothing": times(folder / "ray") == before,
            "the bad line has its error": f"worse.jsonl, line {len(JOBS) + 1}: no control 'cany'" in again["err"],
        },
    }


def ray_cache(folder: Path) -> dict[str, Any]:
    """A cache by two workers, of which one is killed when the texts of its share are there."""
    import numpy as np
    from PIL import Image

    data = folder / "data"
    data.mkdir()
    rows = []
    for k in range(PICTURES):
        values = np.random.default_rng(k).uniform(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(values).resize((96, 96), Image.Resampling.BICUBIC).save(data / f"{k}.png")
        rows.append({"image": f"{k}.png", "text": [f"picture {k}", f"number {k}"]})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.yaml").write_text(json.dumps(CONFIG))  # which is YAML too
    alone = run(folder, "cache", "config.yaml", "cache.folder=alone")
    first: Callable[[], bool] = lambda: any(folder.glob("ray/text-*/[!.]*"))  # noqa: E731
    shared = ["cache", "config.yaml", "cache.folder=ray", "--on", "ray", "--workers", "2"]
    two = struck(folder, first, *shared)
    before = times(folder / "ray")
    again = run(folder, *shared)
    return {
        "entries": len(entries(folder / "alone")),
        "killed": two["killed"],
        "seconds": {"alone": alone["seconds"], "two workers, one killed": two["seconds"], "again": again["seconds"]},
        "said": two["out"].strip().splitlines(),
        "passed": {
            "a worker was killed": two["killed"] is not None,
            "the same entries, byte for byte": entries(folder / "ray") == entries(folder / "alone"),
            "nothing of Ray on the terminal": not two["err"].strip(),
            "the second run makes nothing": times(folder / "ray") == before and "0 views are new" in again["out"],
        },
    }


def processes(folder: Path) -> dict[str, Any]:
    """A job file by two processes."""
    jobs = written(folder, "jobs.jsonl", UNEQUAL)
    run(folder, "generate", "--jobs", jobs, "--out", "alone")
    launcher = [*TWO, "-m", "diffusion_kit.cli"]
    two = run(folder, "generate", "--jobs", jobs, "--out", "two", launcher=launcher)
    made = [line.split()[0] for line in two["out"].splitlines() if line.startswith("two/")]
    return {
        "seconds": two["seconds"],
        "passed": {
            "the same files, byte for byte": files(folder / "two") == files(folder / "alone"),
            "none is made twice": sorted(made) == sorted(f"two/{name}" for name in files(folder / "two")),
        },
    }


def zero(folder: Path) -> dict[str, Any]:
    """ZeRO inference: three jobs of unequal steps on two processes; one job, and a bad line; the pixels before rounding."""
    jobs = written(folder, "jobs.jsonl", UNEQUAL)
    own = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(own))
    worker = [str(Path(__file__).resolve()), "worker"]
    run(folder, "alone-pixels", "generate", "--jobs", jobs, "--out", "alone", launcher=[sys.executable, *worker])
    spread = ["--jobs", jobs, "--deepspeed", "zero3.json", "--out", "zero"]
    two = run(folder, "pixels", "generate", *spread, launcher=[*TWO, *worker])
    apart = {job["seed"]: distance(folder, job["seed"]) for job in UNEQUAL}
    few = written(folder, "few.jsonl", [UNEQUAL[0], BAD])
    launcher = [*TWO, "-m", "diffusion_kit.cli"]
    bad = run(folder, "generate", "--jobs", few, *spread[2:4], "--out", "few", launcher=launcher, code=1)
    held = json.loads((folder / "pixels" / "held.json").read_text())
    return {
        "seconds": two["seconds"],
        "largest difference of a pixel, of the range": apart,
        "numbers of the network": held,
        "passed": {
            "pictures within 1e-3 of the range": max(apart.values()) < 1e-3,
            "all are there": files(folder / "zero").keys() == files(folder / "alone").keys(),
            "half the network in each process": held["here"] == 0 and held["share"] < 0.51 * held["whole"],
            "a process without a job runs along": files(folder / "few").keys() == {"1.png"},
            "the bad line has its error": "few.jsonl, line 2: no control 'cany'" in bad["err"],
        },
    }


def distance(folder: Path, seed: int) -> float:
    import torch

    a, b = (torch.load(folder / name / f"{seed}.pt") for name in ("pixels", "alone-pixels"))
    return float((a - b).abs().max()) / 2  # from -1 to 1


def worker(folder: Path, arguments: list[str]) -> None:
    """The command, which also keeps each picture's pixels as they were before rounding."""
    import torch
    from diffusers.image_processor import VaeImageProcessor

    from diffusion_kit import cli
    from diffusion_kit.making import pictures

    folder.mkdir(exist_ok=True)
    finish, make, last = VaeImageProcessor.postprocess, pictures.make_picture, {}

    def finished(self: Any, image: Any, *args: Any, **more: Any) -> Any:
        last["pixels"] = image.clone()
        return finish(self, image, *args, **more)

    def made(pipe: Any, recipe: Any) -> Any:
        found = make(pipe, recipe)
        torch.save(last["pixels"], folder / f"{recipe.seed}.pt")
        if hasattr(next(pipe.unet.parameters()), "ds_tensor"):
            counts = [(weight.numel(), weight.ds_tensor.numel(), weight.ds_numel) for weight in pipe.unet.parameters()]
            held = dict(zip(("here", "share", "whole"), map(sum, zip(*counts, strict=True)), strict=True))
            (folder / "held.json").write_text(json.dumps(held))
        return found

    VaeImageProcessor.postprocess, pictures.make_picture = finished, made
    sys.exit(cli.main(arguments))


PARTS: dict[str, tuple[Callable[[Path], dict[str, Any]], ...]] = {
    "ray": (ray_generate, ray_cache),
    "processes": (processes,),
    "zero": (zero,),
}


def main(names: list[str]) -> dict[str, Any]:
    """Figures of the parts, and what of them passed."""
    found: dict[str, Any] = {}
    for name in names or PARTS:
        for part in PARTS[name]:
            with tempfile.TemporaryDirectory() as empty:
                prepare(Path(empty))
                found[part.__name__] = part(Path(empty))
    passed = {f"{name}: {what}": ok for name, own in found.items() for what, ok in own.pop("passed").items()}
    return {**found, "passed": passed}


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        print(json.dumps(main(sys.argv[1:]), indent=2))
