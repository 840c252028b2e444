"""Tables of a database as rows: of SQLite and Postgres by SQLAlchemy, of Supabase by its client.

SUPABASE_URL, SUPABASE_SECRET_KEY   where a Supabase project is, and the key to it, which is read from there alone
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import sqlalchemy as sa

from diffusion_kit.ledger.database import INSERTS, connect, parsed
from diffusion_kit.ledger.place import ledger_url

URL, KEY = "SUPABASE_URL", "SUPABASE_SECRET_KEY"
PAGE = 1000  # rows in an answer: Supabase gives no more at once
MOST = 200_000  # rows that a chart is made of
TIMES = (datetime, date, time)
REFUSED = re.compile(r"(2[23]|42)...|PGRST1\d\d|PGRST204")  # SQLSTATE's and PostgREST's: of the data, not of the way
Rows = list[dict[str, Any]]


class Refused(ValueError):
    """A value that its column does not take."""


class Source(Protocol):
    """A table."""

    name: str

    def columns(self) -> list[str]:
        """Its columns; empty where a table without rows does not say."""

    def read(self) -> Rows:
        """All rows, or as many as a chart is made of (`MOST`)."""

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; those whose primary key is there already are left out, so that rows may be sent twice."""


class SqlTable:
    """A table of SQLite or Postgres.

    Raises:
        ValueError: no such table; names those there are.
    """

    def __init__(self, url: str, name: str) -> None:
        own = parsed(url)
        if own.get_backend_name() == "sqlite" and own.database and not Path(own.database).is_file():
            raise ValueError(f"no database {own.database}")
        self.name, self.engine = name, connect(own, own=False)
        names = sa.inspect(self.engine).get_table_names()
        if name not in names:
            raise ValueError(f"no table {name!r}; there are {', '.join(sorted(names)) or 'none'}")
        self.table = sa.Table(name, sa.MetaData(), autoload_with=self.engine)

    def columns(self) -> list[str]:
        return [column.name for column in self.table.columns]

    def read(self) -> Rows:
        order = list(self.table.primary_key.columns) or list(self.table.columns)
        with self.engine.connect() as connection:
            found = connection.execute(sa.select(self.table).order_by(*order).limit(MOST))
            return [dict(row) for row in found.mappings()]

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        statement = INSERTS[self.engine.dialect.name](self.table).on_conflict_do_nothing()
        typed = [{name: self.typed(name, value) for name, value in row.items()} for row in rows]
        with self.engine.execution_options(writes=True).begin() as connection:
            connection.execute(statement, typed)

    def typed(self, column: str, value: Any) -> Any:
        """A value, which may be of JSON, as its column takes it: numbers in columns of text, times in columns of times."""
        try:
            kind = self.table.columns[column].type.python_type
        except (KeyError, NotImplementedError):  # the database says what is wrong
            return value
        if value is None or isinstance(value, kind):
            return value
        if kind is str:
            return str(value)
        if kind in TIMES and isinstance(value, str):
            try:
                return kind.fromisoformat(value)
            except ValueError:
                raise Refused(f"{column} is {value!r}, which is no {kind.__name__}") from None
        return value


class SupabaseTable:
    """A table of a Supabase project, through its client."""

    def __init__(self, url: str, key: str, name: str) -> None:
        try:
            import supabase
        except ImportError:
            raise ImportError("Supabase's client is not installed: pip install 'diffusion_kit[supabase]'") from None
        self.name, self.client = name, cast(Any, supabase.create_client(url, key))

    def columns(self) -> list[str]:
        rows = self.client.table(self.name).select("*").range(0, 0).execute().data
        return list(rows[0]) if rows else []

    def read(self) -> Rows:
        """Page by page, in an order that is the same for each; a project may give fewer rows at once than are asked for."""
        rows, columns = Rows(), self.columns()
        order = ["id"] if "id" in columns else columns[:1]
        while order and len(rows) < MOST:
            own = self.client.table(self.name).select("*").order(order[0])
            page = own.range(len(rows), len(rows) + PAGE - 1).execute().data
            if not page:
                break
            rows += page
        return rows

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.client.table(self.name).upsert([dict(row) for row in rows], ignore_duplicates=True).execute()


def refuses(error: Exception) -> bool:
    """Whether a table was reached and does not take the rows: it would not take them later, either."""
    if isinstance(error, sa.exc.StatementError):
        return not isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError))
    if isinstance(error, Refused):
        return True
    return REFUSED.fullmatch(str(getattr(error, "code", ""))) is not None


def open_table(name: str, source: str | None = None) -> Source:
    """
    Args:
        source: URL of a database (sqlite:///FILE, postgresql+psycopg://...) or of a Supabase project (https://...); None:
            SUPABASE_URL, or else the ledger.

    Raises:
        ValueError: no such table or URL, or the key is missing. ImportError: a driver is not installed.
    """
    url = source or default_source()
    if urlsplit(url).scheme not in ("http", "https"):
        return SqlTable(url, name)
    key = os.environ.get(KEY)
    if not key:
        raise ValueError(f"{KEY} is not set: the key of {urlsplit(url).netloc} is read from there alone")
    return SupabaseTable(url, key, name)


def default_source() -> str:
    return os.environ.get(URL) or ledger_url()


def masked(text: str) -> str:
    """A text without the key, wherever it came from."""
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text
