"""What the user says of runs and pictures: notes, favourites, ratings and tags."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("runs", sa.Column("notes", sa.Text(), nullable=False, server_default=""))
    op.add_column("pictures", sa.Column("favourite", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("pictures", sa.Column("rating", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("pictures", sa.Column("tags", sa.Text(), nullable=False, server_default=""))
