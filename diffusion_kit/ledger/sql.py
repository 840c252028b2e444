"""The ledger's tables as SQL for Postgres, with row-level security as Supabase wants it."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from .database import VERSION
from .tables import Table

HEAD = """\
-- The tables of diffusion_kit's ledger, for Postgres and Supabase. Run once, in the SQL editor or with psql.
-- Row-level security is on: the service key (and the tables' owner) may do everything, users that are signed in may read,
-- and nobody else sees anything."""


def script() -> str:
    """SQL that makes what the migrations make; it may be run again."""
    return "\n\n".join([HEAD, *statements()]) + "\n"


def statements() -> Iterator[str]:
    dialect = postgresql.dialect()
    tables = Table.metadata.sorted_tables
    for table in tables:
        yield f"{str(CreateTable(table, if_not_exists=True).compile(dialect=dialect)).strip()};"
        for index in sorted(table.indexes, key=lambda own: str(own.name)):
            yield f"{str(CreateIndex(index, if_not_exists=True).compile(dialect=dialect)).strip()};"
    yield "CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) PRIMARY KEY);"
    yield f"INSERT INTO alembic_version (version_num) VALUES ('{VERSION}') ON CONFLICT DO NOTHING;"
    for name in [*(table.name for table in tables), "alembic_version"]:
        yield f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY;"
    yield (
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'authenticated') THEN\n"
        "  CREATE ROLE authenticated NOLOGIN;  -- which Supabase has\nEND IF; END $$;"
    )
    for table in tables:
        yield (
            f'DROP POLICY IF EXISTS "signed in users read" ON {table.name};\n'
            f'CREATE POLICY "signed in users read" ON {table.name} FOR SELECT TO authenticated USING (true);\n'
            f"GRANT SELECT ON {table.name} TO authenticated;"
        )
