"""Tensorboard, trackio, mlflow and wandb beside the ledger, each in a real training of a few steps, without a network.

python scripts/verify_trackers.py

What each wrote is read back and compared with metrics.jsonl. Prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("tensorboard", "trackio", "mlflow", "wandb")
CONFIG = """
target: t2i_adapter
output: runs/{name}
base: {{model: default}}
steps: 4
batch: 2
log_every: 1
trackers: [{name}]
data:
  sources: [{{path: data}}]
  resolution: 64
  workers: 0
  holdout: 1
  condition: {{detector: canny}}
validation: {{every: 2, pictures: 1, steps: 1}}
"""


def tensorboard(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "runs/tensorboard/tensorboard/diffusion_kit")).Reload()
    assert found.Tags()["images"], "the sheets of validations are there"
    return {event.step: event.value for event in found.Scalars("loss")}


def trackio(folder: Path) -> dict[int, float]:
    import sqlite3

    (file,) = [own for own in (folder / "trackio").rglob("*.db") if "diffusion" in own.name]
    with sqlite3.connect(file) as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics")]
    return {step: values["loss"] for step, values in rows if "loss" in values}


def mlflow(folder: Path) -> dict[int, float]:
    import mlflow as library

    client = library.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'diffusion_kit'")
    (run,) = client.search_runs([experiment.experiment_id])
    return {own.step: own.value for own in client.get_metric_history(run.info.run_id, "loss")}


def wandb(folder: Path) -> dict[int, float]:
    """Offline, its file is its own: that it is there, and holds the name of the figure."""
    (file,) = (folder / "runs/wandb").rglob("*.wandb")
    assert b"loss" in file.read_bytes()
    return {}


READERS: dict[str, Callable[[Path], dict[int, float]]] = {
    own.__name__: own for own in (tensorboard, trackio, mlflow, wandb)
}


def trained(name: str, folder: Path) -> list[dict[str, Any]]:
    (folder / f"{name}.yaml").write_text(CONFIG.format(name=name))
    own = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": f"{folder}/trackio",
    }
    own |= {"DIFFUSION_KIT_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    line = [sys.executable, "-m", "diffusion_kit.cli", "train", f"{name}.yaml"]
    done = subprocess.run(line, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode or "the tracker" in done.stdout:
        sys.exit(f"{name}: {done.stdout[-1500:]}{done.stderr[-3000:]}")
    return [json.loads(row) for row in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    passed: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "data").mkdir()
        for k in range(4):
            Image.effect_noise((64, 64), 90).convert("RGB").save(folder / f"data/{k}.png")
            (folder / f"data/{k}.txt").write_text(f"noise {k}")
        os.environ["TRACKIO_DIR"] = f"{folder}/trackio"
        for name in NAMES:
            losses = {row["step"]: row["loss"] for row in trained(name, folder) if "loss" in row}
            found = READERS[name](folder)
            same = all(abs(found[step] - loss) < 1e-6 for step, loss in losses.items()) if found else name == "wandb"
            passed[f"{name} has the figures of metrics.jsonl"] = same
            print(name, found, file=sys.stderr, flush=True)
        listed = subprocess.run(
            [sys.executable, "-m", "diffusion_kit.cli", "runs", "--json"],
            env={**os.environ, "DIFFUSION_KIT_HOME": f"{folder}/home"},
            check=True,
            capture_output=True,
            text=True,
        )
        passed["all runs are in the ledger"] = len(json.loads(listed.stdout)) == len(NAMES)
    print(json.dumps({"trackers": list(NAMES), "passed": passed}))


if __name__ == "__main__":
    main()
