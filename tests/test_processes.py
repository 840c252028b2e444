"""Two processes with half the batch each learn what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_models
from safetensors.torch import load_file

from diffusion_kit.training import checkpoints
from diffusion_kit.training.train import train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--master_port", "29617")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def launched(config, processes: int, file: Path) -> None:
    file.write_text(config.dump())
    command = [*TORCHRUN, "--nproc_per_node", str(processes), "-m", "diffusion_kit.cli", "train", str(file)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_learn_what_one_does(tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        config = training_models.config(
            "controlnet", folder, steps=3, batch=4, ema=0.5, optimizer={"learning_rate": 1e-4}
        )
        train(config) if processes == 1 else launched(config, processes, tmp_path / "config.yaml")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(checkpoints.whole(folder / "checkpoints")[-1] / "weights.safetensors")
        first = load_file(checkpoints.whole(folder / "checkpoints")[-1] / "optimizer.safetensors")
        found.append((rows, weights, first))
    (a_rows, a, a_moments), (b_rows, b, b_moments) = found
    assert [row["loss"] for row in a_rows] == pytest.approx([row["loss"] for row in b_rows], rel=1e-5)
    bands = [[value for value in rows[0]["loss_by_noise"] if value is not None] for rows in (a_rows, b_rows)]
    assert bands[0] == pytest.approx(bands[1], rel=1e-5)
    moments = [name for name in a_moments if name.endswith(":exp_avg")]
    assert all(torch.allclose(a_moments[n], b_moments[n], rtol=1e-3, atol=1e-5) for n in moments)
    moved = max((a[name] - b[name]).abs().max().item() for name in a)
    assert moved < 1e-4  # the steps together could move a weight by 3e-4


def on_two_machines(folders: list[Path], *more: str) -> list[str]:
    """What each says of a training that both join, each in a folder of its own."""
    started = []
    for rank, folder in enumerate(folders):
        machine = ["--nnodes", "2", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--nproc_per_node", "1"]
        command = [*TORCHRUN, *machine, "-m", "diffusion_kit.cli", "train", "config.yaml", *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **pipes))
    said = [own.communicate()[0] for own in started]
    assert not any(own.returncode for own in started), said
    return said


@pytest.mark.heavy
def test_machines_without_a_folder_in_common(tmp_path):
    """Each has checkpoints, and they go on from the newest that both have."""
    folders = [tmp_path / name for name in ("first", "second")]
    config = training_models.config("t2i_adapter", "run", steps=2, checkpoints={"every": 1, "each_machine": True})
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text(config.dump())
    on_two_machines(folders)
    for folder in folders:
        assert [checkpoints.step_of(own) for own in checkpoints.whole(folder / "run/checkpoints")] == [1, 2]
    checkpoints.remove(folders[1] / "run/checkpoints/step-00000002")
    said = on_two_machines(folders, "steps=3", "--resume")
    assert "goes on at step 1 of 3" in said[0]
    first, second = (load_file(folder / "run/checkpoints/step-00000003/weights.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folders[0] / "run/result").is_dir()
    assert not (folders[1] / "run/result").exists()
