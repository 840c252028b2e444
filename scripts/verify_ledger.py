"""The ledger under load and accidents, on SQLite and on a real Postgres (Debian's, started here, on a socket of its own).

python scripts/verify_ledger.py

Four processes write 1,000 rows each while a reader polls; a writer is killed in the middle; tables of the schema before are
brought to this one; the SQL for Supabase makes the same tables, with its security. Prints JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import ProgrammingError

from diffusion_kit.ledger import Ledger, database, pictures, runs
from diffusion_kit.ledger.sql import script
from diffusion_kit.ledger.tables import Metric, Run, Table
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe

WRITERS, ROWS = 4, 1000
RECIPE = Recipe(
    "a fox", None, 1, 2, 3.0, 8, 8, "default", None, "E", {}, controls=(ControlRecipe("canny", FileRef("a", "b")),)
)


@contextmanager
def postgres() -> Iterator[str]:
    """A server of its own in a folder of its own, by the user that Debian's package has."""
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)

        def run(*arguments: str) -> None:
            own = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
            subprocess.run([*own, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=folder)

        run(f"{binaries}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "kit", "-E", "UTF8")
        run(
            f"{binaries}/pg_ctl",
            "-D",
            f"{folder}/data",
            "-o",
            f"-k {folder} -h ''",
            "-l",
            f"{folder}/log",
            "-w",
            "start",
        )
        try:
            yield f"postgresql+psycopg://kit@/postgres?host={folder}"
        finally:
            run(f"{binaries}/pg_ctl", "-D", f"{folder}/data", "-m", "fast", "-w", "stop")


def row(number: int, step: int = 0) -> dict[str, Any]:
    about = {"id": f"run{number}", "command": "train", "started": datetime.now(UTC), "folder": f"/runs/{number}"}
    return about | {"target": "unet", "step": step, "steps": ROWS, "config": {"number": number}}


def write(url: str, number: int, rows: int) -> None:
    """Each row in a transaction of its own, as a training writes them; every tenth is a picture with a control."""
    ledger = Ledger(url)
    with ledger.writing() as session:
        runs.begin(session, row(number))
    for step in range(1, rows + 1):
        with ledger.writing() as session:
            if step % 10:
                runs.log(session, row(number, step), {"loss": 1 / step})
            else:
                pictures.add(session, Path(f"/pictures/{number}/{step}.png"), RECIPE, pictures.GENERATE)


def count(session: Any) -> int:
    metrics = session.scalar(sa.select(sa.func.count()).select_from(Metric)) or 0
    return metrics + pictures.count(session, pictures.Query())


def under_load(url: str) -> dict[str, Any]:
    """Four writers at once, and a reader that must never see less than before."""
    context = multiprocessing.get_context("spawn")
    Ledger(url).close()
    writers = [context.Process(target=write, args=(url, k, ROWS)) for k in range(WRITERS)]
    start = time.monotonic()
    for writer in writers:
        writer.start()
    ledger, looks, slowest, last = Ledger(url), 0, 0.0, 0
    while any(writer.is_alive() for writer in writers):
        began = time.monotonic()
        with ledger.reading() as session:
            now = count(session)
        slowest, looks = max(slowest, time.monotonic() - began), looks + 1
        if now < last:
            sys.exit(f"the reader saw {last} rows, and then {now}")
        last = now
        time.sleep(0.02)
    for writer in writers:
        writer.join()
    with ledger.reading() as session:
        found = count(session)
    failed = [writer.exitcode for writer in writers if writer.exitcode]
    return {
        "rows": found,
        "of": WRITERS * ROWS,
        "failed_writers": len(failed),
        "seconds": round(time.monotonic() - start, 1),
        "looks_of_the_reader": looks,
        "slowest_look_ms": round(1000 * slowest, 1),
    }


def killed(url: str) -> dict[str, Any]:
    """A writer that is killed leaves whole rows in their order, and others write on."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(url, 9, 10**6))
    writer.start()
    ledger, seen = Ledger(url), 0
    while seen < 100:
        time.sleep(0.02)
        with ledger.reading() as session:
            seen = len(runs.curve(session, "run9", "loss"))
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    with ledger.writing() as session:
        curve = runs.curve(session, "run9", "loss")
        runs.note(session, "run9", "written after the kill")
    steps = [step for step, _ in curve]
    whole = steps == [step for step in range(1, steps[-1] + 1) if step % 10]
    return {"rows_seen_before": seen, "rows_after": len(curve), "whole_and_in_order": whole and len(curve) >= seen}


def migrated(url: str) -> bool:
    """Rows of the schema before are there in this one."""
    engine = database.connect(database.parsed(url))
    with engine.begin() as connection:
        names = ", ".join(f'"{name}"' for name in sa.inspect(connection).get_table_names())
        if names and engine.dialect.name == "postgresql":
            connection.execute(sa.text(f"DROP TABLE {names} CASCADE"))
    config = database.alembic_config()
    with engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        values = {"now": datetime(2026, 1, 2), "config": '{"steps": 5}'}
        connection.execute(
            sa.text(
                "INSERT INTO runs (id, folder, target, state, step, steps, config, command, host, process, started, "
                "updated) VALUES ('old', '/old', 'unet', 'ended', 5, 5, :config, 'c', 'h', 1, :now, :now)"
            ),
            values,
        )
    engine.dispose()
    ledger = Ledger(url)
    with ledger.writing() as session:
        run = session.get_one(Run, "old")
        kept = (run.config, run.notes, run.step) == ({"steps": 5}, "", 5)
        runs.note(session, "old", "new columns are written")
    with ledger.engine.connect() as connection:
        same = compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    ledger.close()
    return kept and same


def secured(url: str) -> dict[str, bool]:
    """The SQL for Supabase makes the tables of the migrations; signed in users read, others see nothing, neither write."""
    engine = database.connect(database.parsed(url))
    with engine.begin() as connection:
        connection.execute(
            sa.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")
        )
        connection.execute(sa.text("CREATE ROLE anon NOLOGIN"))
        connection.exec_driver_sql(script())
        connection.exec_driver_sql(script())  # it may be run again
        same = compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    ledger = Ledger(url)
    with ledger.writing() as session:
        runs.begin(session, row(1))

    def as_role(role: str, statement: str) -> Any:
        with engine.connect() as connection:
            connection.execute(sa.text(f"SET ROLE {role}"))
            try:
                return connection.execute(sa.text(statement)).scalar()
            except ProgrammingError:
                return "refused"

    return {
        "same_tables_as_the_migrations": same,
        "signed_in_users_read": as_role("authenticated", "SELECT count(*) FROM runs") == 1,
        "signed_in_users_do_not_write": as_role("authenticated", "DELETE FROM runs RETURNING 1") == "refused",
        "others_see_nothing": as_role("anon", "SELECT count(*) FROM runs") == "refused",
    }


def main() -> None:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, postgres() as server:
        for name, url in (("sqlite", f"sqlite:///{folder}/ledger.db"), ("postgres", server)):
            figures[name] = {"load": under_load(url), "kill": killed(url)}
            print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
        figures["sqlite"]["migration_keeps_rows"] = migrated(f"sqlite:///{folder}/old.db")
        figures["postgres"]["migration_keeps_rows"] = migrated(server)
        figures["supabase_sql"] = secured(server)
    passed: dict[str, bool] = {}
    for name in ("sqlite", "postgres"):
        own = figures[name]
        passed[f"{name}: no row lost, no error"] = (
            own["load"]["rows"] == own["load"]["of"] and not own["load"]["failed_writers"]
        )
        passed[f"{name}: readable after a kill"] = own["kill"]["whole_and_in_order"]
        passed[f"{name}: a migration keeps rows"] = own["migration_keeps_rows"]
    passed |= {f"supabase: {what}": done for what, done in figures["supabase_sql"].items()}
    print(json.dumps(figures | {"passed": passed}))


if __name__ == "__main__":
    main()
