"""Pictures and caches that several share are those that one makes; what goes wrong with one stops no other."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import training_models
from test_cli import assert_one_line, outcome

from diffusion_kit.commands import workers
from diffusion_kit.commands.workers import Failed, Worker, in_order
from diffusion_kit.making import loading
from diffusion_kit.training import caching
from diffusion_kit.training.bases import Base
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.store import Store
from diffusion_kit.training.train import build_cache, make_filler

GOOD = [
    {"prompt": "a red fox", "seed": 3},
    {"prompt": "a red fox", "control": "canny=photo.png,scale=0.5", "out": "lines.webp", "count": 2},
    {"prompt": "a boat", "image": "photo.png", "strength": 0.8},
]
BAD = {"prompt": "a cat", "control": "cany=photo.png"}


def written(jobs: list[dict[str, Any]], file: str = "jobs.jsonl") -> str:
    Path(file).write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return file


def made(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def scrambled(tasks: Any, ready: Callable[[], Any], count: int | None, *, gpu: bool) -> Iterator[Any]:
    """Two workers in this process, whose answers come in any order."""
    del count, gpu
    own = [Worker(ready, os.getcwd(), 1) for _ in range(2)]
    rows = []
    for number, task in enumerate(tasks):
        answered = own[number % 2]({"number": [number], "task": [pickle.dumps(task)]})
        rows.append({name: values[0] for name, values in answered.items()})
    random.Random(1).shuffle(rows)
    yield from in_order(rows, len(tasks))


@pytest.fixture
def with_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ray were here: its place is taken by `scrambled`."""
    ray = ModuleType("ray")
    ray.__spec__ = ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(workers, "shared", scrambled)


@pytest.mark.usefixtures("work", "with_ray")
def test_workers_make_what_one_process_makes(model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], loading.load_pipeline
    monkeypatch.setattr(
        loading, "load_pipeline", lambda *given, **more: loaded.append(load(*given, **more)) or loaded[-1]
    )
    common = ["generate", "--model", model, "--steps", 2, "--jobs", written(GOOD)]
    assert outcome([*common, "--out", "alone"]) == 0
    alone = capsys.readouterr().out
    assert outcome([*common, "--out", "shared", "--on", "ray"]) == 0
    assert capsys.readouterr().out.replace("shared/", "alone/") == alone
    assert made("shared") == made("alone")
    assert all(pipe.answers.known for pipe in loaded[-2:]), "a worker encodes what its pictures share once"


@pytest.mark.usefixtures("work", "with_ray")
def test_a_bad_line_is_told_and_the_others_are_made_once(model: Path, capsys: Any, monkeypatch: Any) -> None:
    jobs = written([GOOD[0], BAD, GOOD[2]])
    command = ["generate", "--model", model, "--steps", 2, "--jobs", jobs, "--out", "made", "--on", "ray"]
    assert outcome(command) == 2
    assert_one_line(capsys, "jobs.jsonl, line 2: no control 'cany' comes with the base")
    before = {file: file.stat().st_mtime_ns for file in Path("made").iterdir()}
    assert sorted(file.name for file in before) == ["1.png", "3.png"]
    assert outcome(command) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "2 of 3 pictures are there" in told.err
    assert before == {file: file.stat().st_mtime_ns for file in Path("made").iterdir()}


@pytest.mark.usefixtures("work", "with_ray")
def test_a_model_that_no_worker_can_load_is_one_line(capsys: Any) -> None:
    command = ["generate", "--model", "none/", "--jobs", written(GOOD), "--out", "made", "--on", "ray"]
    assert outcome(command) == 2
    assert_one_line(capsys, "no model 'none/'")


def test_answers_come_in_the_order_of_their_tasks() -> None:
    for order in itertools.permutations(range(4)):
        rows = [{"number": k, "answer": pickle.dumps((True, k))} for k in order]
        assert list(in_order(rows, 4)) == [0, 1, 2, 3]
    rows = [{"number": k, "answer": pickle.dumps((True, k))} for k in (3, 0, 2)]
    zero, missing, *others = in_order(rows, 4)
    assert (zero, others) == (0, [2, 3])
    assert isinstance(missing, Failed)
    assert not missing.bad
    rows.append({"number": 1, "answer": pickle.dumps((False, Failed("no model", True)))})
    with pytest.raises(ValueError, match="no model"):
        list(in_order(rows, 4))


@pytest.mark.usefixtures("work")
def test_ray_that_is_missing_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["generate", "--jobs", written(GOOD)], ["cache", "config.yaml"]):
        assert outcome([*command, "--on", "ray"]) == 1
        assert_one_line(capsys, 'ray is not installed: pip install "diffusion_kit[ray]"')


@pytest.mark.usefixtures("work", "with_ray")
def test_options_that_do_not_fit_are_one_line(capsys: Any, tmp_path: Path) -> None:
    jobs = written(GOOD)
    config = training_models.config("t2i_adapter", tmp_path / "run", cache={"folder": "cache"})
    Path("config.yaml").write_text(config.dump())
    Path("zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    for command, line in [
        (["generate", "a fox", "--on", "ray"], "--on ray shares the lines of a job file: give --jobs"),
        (
            ["generate", "--jobs", jobs, "--workers", "2"],
            "--workers is 2: it must be 1 or more, and goes with --on ray",
        ),
        (["generate", "--jobs", jobs, "--on", "ray", "--workers", "0"], "--workers is 0: it must be 1 or more"),
        (["generate", "a fox", "--deepspeed", "zero1.json"], "share the lines of a job file: give --jobs"),
        (["cache", "config.yaml", "--on", "ray", "--part", "1/2"], "--part and --on ray do not go together"),
    ]:
        assert outcome(command) == 2
        assert_one_line(capsys, line)


# The cache


def of_cache(folder: Path, **more: Any) -> Config:
    own: dict[str, Any] = {"condition": {"detector": "canny"}, "flip": 0.5}
    own |= {"sources": [{"path": training_models.data(2 * caching.BLOCK + 6)}]}
    return training_models.config("t2i_adapter", folder / "run", data=own, cache={"folder": str(folder)}, **more)


def entries(folder: Path) -> dict[str, bytes]:
    found = {}
    for place in (path for path in folder.iterdir() if path.is_dir()):
        store = Store(place)
        for key in store._places:
            values = sorted((store.get(key) or {}).items())
            found[f"{place.name}/{key}"] = b"".join(value.contiguous().numpy().tobytes() for _, value in values)
    return found


def test_shares_in_any_order_make_the_cache_of_one_process(tmp_path: Path) -> None:
    build_cache(of_cache(tmp_path / "alone"), (0, 1), lambda line: None)
    fillers = [make_filler(of_cache(tmp_path / "shared"), lambda line: None) for _ in range(2)]
    counts = [fillers[part % 2].fill((part, 4)) for part in (2, 3, 0, 1)]
    assert [count > 0 for count in counts] == [True, False, True, True]  # there are three blocks
    assert sum(fillers[0].fill((part, 4)) for part in range(4)) == 0
    alone, shared = entries(tmp_path / "alone"), entries(tmp_path / "shared")
    assert len(alone) > 4 * caching.BLOCK
    assert shared == alone


def test_a_cache_that_was_broken_off_goes_on_in_the_same_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a shard is written: whole groups are in it, and the rest of a block falls into those that were left."""
    encode, flush, groups = Base.encode, Store.flush, list[tuple[str, ...]]()
    monkeypatch.setattr(Base, "encode", lambda own, x, names: groups.append(tuple(names)) or encode(own, x, names))
    monkeypatch.setattr(caching, "TOGETHER", (8 * 1024**2, 5))
    build_cache(of_cache(tmp_path / "alone"), (0, 1), lambda line: None)
    expected = groups.copy()
    groups.clear()

    shards, there = itertools.count(1), []

    def broken_off(own: Store) -> None:
        latents = own.folder.name.startswith("latents-") and bool(own._kept)
        flush(own)
        if latents and next(shards) in (2, 5):
            there.append(len(own))
            raise KeyboardInterrupt

    monkeypatch.setattr("diffusion_kit.training.data.store.SHARD", 1)
    monkeypatch.setattr(Store, "flush", broken_off)
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            build_cache(of_cache(tmp_path / "parts"), (0, 1), lambda line: None)
    assert there == [10, 25], "in the middle of a block, whose pictures are looked at in two ways each"
    assert len(expected) > 20
    assert sorted(set(groups)) == sorted(expected)
    assert entries(tmp_path / "parts") == entries(tmp_path / "alone")


@pytest.mark.parametrize("count", [1, caching.BLOCK, 5 * caching.BLOCK + 1])
@pytest.mark.parametrize("shares", [1, 3, 8])
def test_every_picture_is_of_one_share(count: int, shares: int) -> None:
    found = [k for part in range(shares) for block in caching.blocks_of(count, (part, shares)) for k in block]
    assert sorted(found) == list(range(count))


# Processes


def launched(*arguments: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launcher, "-m", "diffusion_kit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)


@pytest.mark.heavy
@pytest.mark.usefixtures("work")
def test_processes_make_what_one_makes_and_all_end(model: Path) -> None:
    common = ["generate", "--model", model, "--steps", 2]
    assert outcome([*common, "--jobs", written(GOOD, "good.jsonl"), "--out", "alone"]) == 0
    done = launched(*common, "--jobs", written([*GOOD, BAD]), "--out", "shared")
    assert done.returncode == 1, done.stderr[-2000:]  # the launcher's, for the line that is bad
    assert "diffusion-kit: jobs.jsonl, line 4: no control 'cany'" in done.stderr
    assert made("shared") == made("alone")
    told = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("shared/")]
    assert sorted(told) == sorted(f"shared/{name}" for name in made("shared"))
