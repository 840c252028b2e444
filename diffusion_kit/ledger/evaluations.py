"""Evaluations: the lines of reports, written by `diffusion-kit evaluate` and by a run's validations."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from .database import upsert
from .tables import Evaluation

REPORT = "report.json"


def add(
    session: Session,
    folder: Path,
    report: Mapping[str, Any],
    *,
    made: datetime | None = None,
    run: str | None = None,
    step: int | None = None,
) -> None:
    """Writes every line of a report (as `evaluation.Report.to_json` has it) that lies in `folder`."""
    about, own = report["about"], str(folder.absolute())
    same = {"report": own, "made": made or datetime.now(UTC), "run_id": run, "step": step}
    same |= {name: str(about.get(name, "")) for name in ("model", "control", "detector")}
    rows = []
    for line in report["lines"]:
        key = uuid.uuid5(uuid.NAMESPACE_URL, f"file://{own}#{line['measure']}#{line['arm']}").hex
        rows.append(
            {"id": key, "measure": line["measure"], "arm": line["arm"]}
            | {name: line["own"][name] for name in ("value", "low", "high")}
            | same
        )
    upsert(session, Evaluation, rows)


def add_file(session: Session, file: Path, *, run: str | None = None, step: int | None = None) -> None:
    """Writes a report's file, as of when it was written."""
    made = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    add(session, file.parent, json.loads(file.read_text("utf-8")), made=made, run=run, step=step)


def found(session: Session, run: str | None = None) -> Sequence[Evaluation]:
    """The newest first; of one run, or all."""
    own = select(Evaluation).order_by(Evaluation.made.desc(), Evaluation.measure, Evaluation.arm)
    return session.scalars(own if run is None else own.where(Evaluation.run_id == run)).all()
