"""Run folders: what in them tells what the run is, so that the ledger can be made again from them."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from diffusion_kit.recipes.whole import write_whole

RUN = "run.json"  # id, when it was begun, and by which command
LOGS = ("timing", "metrics")


def about(folder: Path) -> dict[str, Any]:
    """Id, command and begin of a run."""
    own = json.loads((folder / RUN).read_text("utf-8"))
    return {"id": own["id"], "command": own["command"], "started": datetime.fromisoformat(own["started"])}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    return config


def new_run(folder: Path, command: str) -> dict[str, Any]:
    """Writes a run's file, once: it keeps its id wherever the folder goes."""
    file = folder / RUN
    if not file.is_file():
        own = {"id": uuid.uuid4().hex[:12], "command": command, "started": datetime.now(UTC).isoformat()}
        write_whole(file, f"{json.dumps(own)}\n".encode())
    return about(folder)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    rows = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) and "step" in row else []
    return rows
