"""The database: how it is opened, brought to the newest shape, read and written.

SQLite writes ahead (WAL), so that readers and the one writer do not wait for each other, and begins every writing with its
lock (BEGIN IMMEDIATE): a reader that becomes a writer would else be refused at once, whatever the timeout.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from .place import ledger_url
from .tables import Table

VERSION = "0002"  # of the tables, the newest in `migrations/versions`
BUSY = 20  # seconds that a writer waits for another
REACH = 5  # seconds in which a server must answer to a connection
INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
NETWORK = {  # of libpq: a server that is gone is given up in seconds, not in TCP's quarter of an hour
    "connect_timeout": REACH,
    "tcp_user_timeout": 1000 * BUSY,
    "options": f"-c statement_timeout={1000 * BUSY}",
}


class Ledger:
    """An open ledger, of the newest shape.

    Args:
        url: of SQLite ("sqlite:///ledger.db") or Postgres ("postgresql+psycopg://..."); None: as DIFFUSION_KIT_LEDGER and
            DIFFUSION_KIT_HOME say.

    Raises:
        ValueError: no such URL, or tables of a newer version. ImportError: the driver is not installed.
        sqlalchemy.exc.SQLAlchemyError: the database cannot be opened.
    """

    def __init__(self, url: str | None = None) -> None:
        self.url = parsed(url or ledger_url())
        self.engine = connect(self.url)
        migrate(self.engine)

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """All that is written inside is there afterwards, or nothing of it."""
        engine = self.engine.execution_options(writes=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()


def parsed(url: str) -> URL:
    """
    Raises:
        ValueError: no URL, or of a database that is neither SQLite nor Postgres.
    """
    try:
        found = make_url(url)
    except ArgumentError:
        raise ValueError(
            "no URL of a database: sqlite:///FILE or postgresql+psycopg://...; the history's is in DIFFUSION_KIT_LEDGER"
        ) from None
    if found.drivername in ("postgres", "postgresql"):  # as Supabase and others write it
        found = found.set(drivername="postgresql+psycopg")
    if found.get_backend_name() not in INSERTS:
        raise ValueError(f"a ledger is of SQLite or Postgres, not of {found.get_backend_name()}")
    return found


def connect(url: URL, *, own: bool = True) -> Engine:
    """
    Args:
        own: the ledger: a file that is not there is made, and it writes ahead, which stays with it.
    """
    if url.get_backend_name() == "postgresql":
        try:
            return create_engine(url, connect_args=NETWORK, pool_pre_ping=True)
        except ImportError:
            raise ImportError("a ledger in Postgres needs psycopg: pip install 'diffusion_kit[postgres]'") from None
    if url.database and own:
        Path(url.database).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY})
    event.listen(engine, "connect", _prepare)
    if own:
        event.listen(engine, "connect", _write_ahead)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin as `_begin` says, not as the driver does
    connection.execute("PRAGMA foreign_keys=ON")


def _write_ahead(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def migrate(engine: Engine) -> None:
    """Brings the tables to the newest shape; rows stay.

    Raises:
        ValueError: they are of a newer version of the kit.
    """
    if version(engine) == VERSION:
        return
    from alembic import command
    from alembic.script import ScriptDirectory

    config = alembic_config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with alone(engine):
        found = version(engine)
        if found is not None and found not in known:
            raise ValueError(f"the ledger's tables are of version {found}, which a newer diffusion-kit made: update it")
        with engine.execution_options(writes=True).begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def alembic_config() -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config


def version(engine: Engine) -> str | None:
    """Of the tables; None where there are none."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


@contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """One process at a time is inside."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(hashtext('diffusion_kit'))"))
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(hashtext('diffusion_kit'))"))
    elif engine.url.database:
        with Path(f"{engine.url.database}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    else:
        yield


def upsert(session: Session, table: type[Table], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows; of those that are there, the columns given are replaced."""
    if not rows:
        return
    statement = INSERTS[session.get_bind().dialect.name](table)
    keys = [column.name for column in inspect(table).primary_key]
    changed = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    session.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), list(rows))
