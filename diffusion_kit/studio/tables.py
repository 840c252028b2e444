"""Tables of a database as rows: of SQLite and Postgres by SQLAlchemy, of Supabase by its client.

SUPABASE_URL, SUPABASE_SECRET_KEY   where a Supabase project is, and the key to it, which is read from there alone
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import sqlalchemy as sa

from diffusion_kit.ledger.database import INSERTS, connect, parsed
from diffusion_kit.ledger.place import ledger_url

URL, KEY = "SUPABASE_URL", "SUPABASE_SECRET_KEY"
PAGE = 1000  # rows in an answer: Supabase gives no more at once
MOST = 200_000  # rows that a chart is made of
TIMES = (datetime, date, time)
REFUSED = re.compile("2[23]|42")  # classes of SQLSTATE: of the data, not of the way to the table
Rows = list[dict[str, Any]]


class Refused(ValueError):
    """A value that its column does not take."""


class Source(Protocol):
    """A table."""

    name: str

    def columns(self) -> list[str]:
        """Its columns; empty where a table without rows does not say."""

    def read(self) -> Rows:
        """All rows, page by page."""

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; those whose primary key is there already are left out, so that rows may be sent twice."""


class SqlTable:
    """A table of SQLite or Postgres.

    Raises:
        ValueError: no such table; names those there are.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name, self.engine = name, connect(parsed(url))
        names = sa.inspect(self.engine).get_table_names()
        if name not in names:
            raise ValueError(f"no table {name!r}; there are {', '.join(sorted(names)) or 'none'}")
        self.table = sa.Table(name, sa.MetaData(), autoload_with=self.engine)

    def columns(self) -> list[str]:
        return [column.name for column in self.table.columns]

    def read(self) -> Rows:
        order = list(self.table.primary_key.columns) or list(self.table.columns)
        own, rows = sa.select(self.table).order_by(*order), Rows()
        with self.engine.connect() as connection:
            while len(rows) < MOST:
                page = connection.execute(own.limit(PAGE).offset(len(rows))).mappings().all()
                rows += [dict(row) for row in page]
                if len(page) < PAGE:
                    break
        return rows

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
        rows = Rows()
        while len(rows) < MOST:
            page = self.client.table(self.name).select("*").range(len(rows), len(rows) + PAGE - 1).execute().data
            rows += page
            if len(page) < PAGE:
                break
        return rows

    def insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.client.table(self.name).upsert([dict(row) for row in rows], ignore_duplicates=True).execute()


def refuses(error: Exception) -> bool:
    """Whether a table was reached and does not take the rows: it would not take them later, either."""
    if isinstance(error, sa.exc.StatementError):
        return not isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError))
    if isinstance(error, Refused):
        return True
    return REFUSED.match(str(getattr(error, "code", ""))) is not None and len(str(error.code)) == 5  # type: ignore[attr-defined]


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
