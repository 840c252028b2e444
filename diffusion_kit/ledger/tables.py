"""The tables. A row's key is made from what it tells of, so that writing it twice is writing it once.

Another shape of a table is another step in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, ForeignKey, MetaData, Text, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Utc(TypeDecorator[datetime]):
    """A moment with its time zone, stored as UTC: SQLite has no zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {datetime: Utc, str: Text, dict[str, Any]: JSON}


class Run(Table):
    """A training.

    Attributes:
        id: as its folder says in run.json.
        state: "running", "ended" (with a result), "stopped" or "failed"; one that was killed still says "running".
        config: the whole configuration.
        host, process: where it runs, or ran last.
        updated: when it last wrote something.
        notes: the user's.
    """

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    folder: Mapped[str]
    target: Mapped[str]
    state: Mapped[str]
    step: Mapped[int]
    steps: Mapped[int]
    config: Mapped[dict[str, Any]]
    command: Mapped[str]
    host: Mapped[str]
    process: Mapped[int]
    started: Mapped[datetime]
    updated: Mapped[datetime]
    notes: Mapped[str] = mapped_column(server_default="")


class Metric(Table):
    """A figure of a run at a step, such as "loss" or "validation/fidelity"."""

    __tablename__ = "metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[float]


class Picture(Table):
    """A file with a picture.

    Attributes:
        id: of host and path.
        host: the machine on which the file is.
        source: who made it: "studio", "api", "generate" or "run".
        recipe: its JSON, or None (a sheet of a validation).
        digest: of the recipe; another one is another picture under the same name.
        favourite, rating (0 to 5, 0 for none), tags (with spaces between): the user's.
    """

    __tablename__ = "pictures"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    file: Mapped[str] = mapped_column(index=True)
    made: Mapped[datetime] = mapped_column(index=True)
    source: Mapped[str]
    run_id: Mapped[str | None] = mapped_column(index=True)
    step: Mapped[int | None]
    task: Mapped[str]
    prompt: Mapped[str]
    negative_prompt: Mapped[str | None]
    model: Mapped[str]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    steps: Mapped[int | None]
    guidance_scale: Mapped[float | None]
    width: Mapped[int]
    height: Mapped[int]
    recipe: Mapped[str | None]
    digest: Mapped[str]
    favourite: Mapped[bool] = mapped_column(server_default=false())
    rating: Mapped[int] = mapped_column(server_default="0")
    tags: Mapped[str] = mapped_column(server_default="")
    controls: Mapped[list[PictureControl]] = relationship(
        order_by="PictureControl.position", lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )


class PictureControl(Table):
    """A control of a picture, as its recipe has it; `scale` is a number, or one for each level with colons between."""

    __tablename__ = "controls"

    picture_id: Mapped[str] = mapped_column(ForeignKey("pictures.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(index=True)
    detect: Mapped[str | None]
    scale: Mapped[str]
    start: Mapped[float]
    end: Mapped[float]
    mode: Mapped[str]


class Evaluation(Table):
    """A figure of `diffusion-kit evaluate`, or of a run's validation.

    Attributes:
        report: folder of the report.
        arm: what was measured: "scale 1", "without" or "neutral" ...
        low, high: ends of the interval of confidence (95 %), where one was made.
    """

    __tablename__ = "evaluations"

    id: Mapped[str] = mapped_column(primary_key=True)
    made: Mapped[datetime] = mapped_column(index=True)
    report: Mapped[str]
    run_id: Mapped[str | None] = mapped_column(index=True)
    step: Mapped[int | None]
    model: Mapped[str]
    control: Mapped[str]
    detector: Mapped[str]
    measure: Mapped[str]
    arm: Mapped[str]
    value: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
