"""Runs, metrics, pictures with their controls, and evaluations."""

import sqlalchemy as sa
from alembic import op

from diffusion_kit.ledger.tables import Utc

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("folder", "target", "state")),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("step", "steps")),
        sa.Column("config", sa.JSON(), nullable=False),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("command", "host")),
        sa.Column("process", sa.Integer(), nullable=False),
        *(sa.Column(name, Utc(), nullable=False) for name in ("started", "updated")),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_table(
        "metrics",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("run_id", "name")),
        sa.Column("step", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_metrics_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "name", "step", name="pk_metrics"),
    )
    op.create_table(
        "pictures",
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("id", "host", "file")),
        sa.Column("made", Utc(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text()),
        sa.Column("step", sa.Integer()),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("task", "prompt")),
        sa.Column("negative_prompt", sa.Text()),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger()),
        sa.Column("steps", sa.Integer()),
        sa.Column("guidance_scale", sa.Double()),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("width", "height")),
        sa.Column("recipe", sa.Text()),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_pictures"),
    )
    for name in ("file", "made", "run_id"):
        op.create_index(f"ix_pictures_{name}", "pictures", [name])
    op.create_table(
        "controls",
        sa.Column("picture_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("detect", sa.Text()),
        sa.Column("scale", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=False) for name in ("start", "end")),
        sa.Column("mode", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["picture_id"], ["pictures.id"], name="fk_controls_picture_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("picture_id", "position", name="pk_controls"),
    )
    op.create_index("ix_controls_kind", "controls", ["kind"])
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("made", Utc(), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text()),
        sa.Column("step", sa.Integer()),
        *(sa.Column(name, sa.Text(), nullable=False) for name in ("model", "control", "detector", "measure", "arm")),
        *(sa.Column(name, sa.Double()) for name in ("value", "low", "high")),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
    )
    for name in ("made", "run_id"):
        op.create_index(f"ix_evaluations_{name}", "evaluations", [name])
