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


def launched(config, processes: int, file: Path) -> None:
    file.write_text(config.dump())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "29617",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["-m", "diffusion_kit.cli", "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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
