"""Runs and their metrics: written by the trainer, read by `diffusion-kit runs` and the studio."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psutil
from sqlalchemy import and_, delete, func, select, update
from sqlalchemy.orm import Session

from .database import upsert
from .tables import Metric, Run

RUNNING, ENDED, STOPPED, FAILED, LOST = "running", "ended", "stopped", "failed", "lost"


def begin(session: Session, row: Mapping[str, Any]) -> None:
    """Writes that a run begins, or goes on, in this process; metrics after its step are dropped, for they come again.

    Args:
        row: id, folder, target, step, steps, config, command and started of `tables.Run`.
    """
    _write(session, row)
    session.execute(delete(Metric).where(Metric.run_id == row["id"], Metric.step > row["step"]))


def log(session: Session, row: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Writes figures of the step of `row`, which is as of `begin`; what is no finite number is left out."""
    _write(session, row)
    own = {"run_id": row["id"], "step": row["step"]}
    upsert(session, Metric, [{**own, "name": name, "value": value} for name, value in numbers(values)])


def _write(session: Session, row: Mapping[str, Any]) -> None:
    here = {"state": RUNNING, "updated": datetime.now(UTC), "host": socket.gethostname(), "process": os.getpid()}
    upsert(session, Run, [{**row, **here}])


def numbers(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, float]]:
    """Figures by their names, of trees with slashes between."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{before}{name}", float(value)


def end(session: Session, run: str, state: str) -> None:
    session.execute(update(Run).where(Run.id == run).values(state=state, updated=datetime.now(UTC)))


def note(session: Session, run: str, notes: str) -> None:
    session.execute(update(Run).where(Run.id == run).values(notes=notes))


def found(session: Session) -> Sequence[Run]:
    """All runs, those that began last first."""
    return session.scalars(select(Run).order_by(Run.started.desc())).all()


def find(session: Session, name: str) -> Run:
    """The run of that id, or its beginning, or of that folder, or its name.

    Raises:
        ValueError: there is none, or more than one; names them.
    """
    rows = found(session)
    path = os.path.abspath(name)
    for fits in (
        [run for run in rows if run.id == name or run.folder == path],
        [run for run in rows if os.path.basename(run.folder) == name],
        [run for run in rows if run.id.startswith(name)],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise ValueError(f"{name} may be {', '.join(f'{run.id} ({run.folder})' for run in fits)}: say which")
    raise ValueError(f"no run {name}; `diffusion-kit runs` lists them")


def state_of(run: Run) -> str:
    """Its state; "lost" where it says that it runs and its process, on this machine, is gone."""
    if run.state != RUNNING or run.host != socket.gethostname():
        return run.state
    return RUNNING if is_alive(run) else LOST


def is_alive(run: Run) -> bool:
    """Whether a process of its number was there before the run last wrote."""
    try:
        return psutil.Process(run.process).create_time() <= run.updated.timestamp() + 1
    except psutil.Error:
        return False


def curve(session: Session, run: str, name: str) -> list[tuple[int, float]]:
    """Steps and values of a figure."""
    own = select(Metric.step, Metric.value).where(Metric.run_id == run, Metric.name == name).order_by(Metric.step)
    return [(step, value) for step, value in session.execute(own)]


def names(session: Session, ids: Sequence[str]) -> list[str]:
    """Names of the figures that any of the runs has."""
    return list(session.scalars(select(Metric.name).where(Metric.run_id.in_(ids)).distinct().order_by(Metric.name)))


def last(session: Session, run: str) -> dict[str, float]:
    """The last value of every figure."""
    ends = select(Metric.name, func.max(Metric.step).label("step")).where(Metric.run_id == run).group_by(Metric.name)
    end = ends.subquery()
    both = and_(Metric.name == end.c.name, Metric.step == end.c.step)
    own = select(Metric.name, Metric.value).join(end, both).where(Metric.run_id == run)
    return {name: value for name, value in session.execute(own)}
