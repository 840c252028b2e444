"""Two processes with half of a batch each learn what one learns with the whole, in whatever way they share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_models
from conftest import needs
from safetensors.torch import load_file

from diffusion_kit.training import checkpoints

WORKER = Path(__file__).with_name("parallel_worker.py")
needs("deepspeed", "scale")


def case(output: Path, stage: int | None, *, target: str = "controlnet", **more: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "batch": 4,
        "micro_batch": 1,
        "steps": 4,
        "ema": 0.9,
        "threads": 1,
        "checkpoints": {"every": 1, "keep": 9},
        "validation": {"every": 4, "pictures": 2, "steps": 2},
    }
    if stage is not None:
        own["deepspeed"] = {"zero_optimization": {"stage": stage}}
    config = training_models.config(target, output, **{**own, **more})
    return {"config": config.model_dump(mode="json", exclude_unset=True)}


def run(cases: list[dict[str, Any]], processes: int, folder: Path) -> str:
    file = folder / f"cases-{processes}.json"
    file.write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launcher, str(WORKER), str(file)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
    return done.stdout + done.stderr


def kept(output: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.folder_of(output / "checkpoints", step) / f"{part}.safetensors")


def apart(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of a tensor."""
    assert own.keys() == other.keys()
    norms = {name: float(value.double().norm()) for name, value in own.items()}
    return max(float((own[name].double() - other[name].double()).norm()) / norm for name, norm in norms.items() if norm)


def moved(output: Path, other: Path, step: int) -> float:
    """How far weights are apart, against how far they moved since the first step."""
    start, own, theirs = kept(output, 1, "weights"), kept(output, step, "weights"), kept(other, step, "weights")
    gap = sum(float((own[name] - theirs[name]).double().square().sum()) for name in own)
    way = sum(float((own[name] - start[name]).double().square().sum()) for name in own)
    return (gap / way) ** 0.5


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def gradient(output: Path) -> dict[str, torch.Tensor]:
    """Of the first step, times a factor: the first moment is nothing else."""
    return {name: value for name, value in kept(output, 1, "optimizer").items() if name.endswith(":exp_avg")}


STAGES = {"ddp": None, "0": 0, "1": 1, "2": 2, "3": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and two in every way of sharing, the last with a fault; checkpoints of one go on in the other."""
    folder = tmp_path_factory.mktemp("parallel")
    faulty = {**case(folder / "fault", 1), "fault": "gradient x 1.5"}
    run([case(folder / "one", None)], 1, folder)
    run([*(case(folder / name, stage) for name, stage in STAGES.items()), faulty], 2, folder)
    return folder


@pytest.mark.parametrize("name", list(STAGES))
def test_two_processes_learn_what_one_learns(trained: Path, name: str) -> None:
    assert apart(gradient(trained / "one"), gradient(trained / name)) < 1e-5
    assert moved(trained / "one", trained / name, 4) < 1e-3
    for part in ("ema", "optimizer"):
        assert apart(kept(trained / "one", 2, part), kept(trained / name, 2, part)) < 1e-3


@pytest.mark.parametrize("name", list(STAGES))
def test_validation_and_result_are_those_of_one(trained: Path, name: str) -> None:
    """Both wear the averaged weights, which in stage 3 no process has."""
    own, other = (figures(trained / which) for which in ("one", name))
    assert own.keys() == other.keys()
    assert own == pytest.approx(other, rel=1e-4)
    file = "diffusion_pytorch_model.safetensors"
    assert apart(load_file(trained / "one" / "result" / file), load_file(trained / name / "result" / file)) < 1e-3


def test_codes_of_a_new_movq_begin_alike_in_every_way_of_sharing(tmp_path: Path) -> None:
    """They are measured before the first step, when the optimizer has weights of its own already."""
    ways = {"one": None, "half": 1, **STAGES}
    more: dict[str, Any] = {"network": training_models.MOVQ, "steps": 1, "validation": {"every": 0}}
    cases = {name: case(tmp_path / name, stage, target="autoencoder", **more) for name, stage in ways.items()}
    cases["half"]["config"]["precision"] = "bf16"
    run([cases.pop("one")], 1, tmp_path)
    run(list(cases.values()), 2, tmp_path)
    (codes,) = (name for name, value in kept(tmp_path / "one", 1, "weights").items() if "quantize.embedding" in name)
    expected = {codes: kept(tmp_path / "one", 1, "weights")[codes]}
    assert float(expected[codes].abs().max()) > 1 / 32, "they are drawn nearer to zero"
    for name in cases:
        assert apart(expected, {codes: kept(tmp_path / name, 1, "weights")[codes]}) < (0.1 if name == "half" else 1e-3)


def figures(output: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return next(row["validation"] for row in rows if "validation" in row)


def test_the_comparison_finds_a_fault(trained: Path) -> None:
    assert apart(gradient(trained / "one"), gradient(trained / "fault")) > 0.1


def test_a_base_that_is_loaded_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    """And its fingerprint in the card is that of its file."""
    parts = {**case(tmp_path / "parts", 3, target="t2i_adapter", steps=2), "fault": "never whole"}
    whole = {**case(tmp_path / "whole", 3, target="t2i_adapter", steps=2), "fault": "loaded whole"}
    plain = case(tmp_path / "plain", None, target="t2i_adapter", steps=2)
    run([parts, whole, plain], 2, tmp_path)
    first, second = (kept(tmp_path / name, 2, "weights") for name in ("parts", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = [(tmp_path / name / "result/README.md").read_text() for name in ("parts", "whole", "plain")]
    hashes = [line for text in told for line in text.splitlines() if "| base |" in line]
    assert len(hashes) == 3
    assert len(set(hashes)) == 1
