"""A live dashboard over any table: a chart for each column, the rows, and a grid in which rows are written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import pandas as pd

from diffusion_kit.ledger.place import home
from diffusion_kit.ledger.recorder import summary

from .grid import grid, rows_of
from .outbox import Outbox
from .tables import MOST, Source, masked

CHARTS: dict[str, Any] = {"bar": gr.BarPlot, "line": gr.LinePlot, "scatter": gr.ScatterPlot}
SHOWN = 1000  # rows in the page's table


@dataclass
class Live:
    """The last data of a table, and how old they are."""

    source: Source
    outbox: Outbox
    data: pd.DataFrame | None = None
    at: float = 0.0
    problem: str | None = None  # why it was not read
    unsent: str | None = None  # why rows still wait
    columns: list[str] = field(default_factory=list)

    def look(self) -> pd.DataFrame:
        """Sends what waits and reads; where the table is not reached, the last data stay."""
        try:
            self.outbox.send()
            self.unsent = None
        except Exception as error:  # what holds up the rows may let them be read
            self.unsent = masked(summary(error))
        try:
            self.columns = self.columns or self.source.columns()
            self.data = pd.DataFrame(self.source.read(), columns=self.columns or None)
            self.at, self.problem = time.monotonic(), None
        except Exception as error:  # whatever the network and a driver have
            self.problem = masked(summary(error))
        return pd.DataFrame(columns=self.columns) if self.data is None else self.data

    @property
    def words(self) -> str:
        waiting = len(self.outbox)
        told = f" {waiting} rows wait to be sent{f' ({self.unsent})' if self.unsent else ''}." if waiting else ""
        told += f" **{masked(self.outbox.refused)}**" if self.outbox.refused else ""
        if self.problem is None:
            count = 0 if self.data is None else len(self.data)
            return f"{count} rows{', the first of more' if count >= MOST else ''}, just read.{told}"
        age = "nothing was read yet" if self.data is None else f"the data are {aged(time.monotonic() - self.at)} old"
        return f"**Not reached** ({self.problem}); {age}.{told}"


def aged(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def make_live(source: Source, where: str) -> Live:
    """
    Args:
        where: names the database, so that rows that wait for one do not go to another.
    """
    own = hashlib.sha256(where.encode()).hexdigest()[:12]
    return Live(source, Outbox(home() / "outbox" / f"{source.name}-{own}", source))


def check_columns(live: Live, x: str, ys: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a column that the table does not have.
    """
    live.look()
    known = live.columns
    for name in (x, *ys) if known else ():
        if name not in known:
            raise ValueError(f"the table {live.source.name} has no column {name!r}; it has {', '.join(known)}")


def build(live: Live, x: str, ys: Sequence[str], every: float, kind: str = "bar") -> gr.Blocks:
    """The page.

    Args:
        every: seconds between two looks at the table.
    """
    with gr.Blocks(title=f"{live.source.name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"## {live.source.name}")
        words = gr.Markdown(elem_id="words")
        with gr.Row():
            plots = [
                CHARTS[kind](x=x, y=y, title=y, elem_id=f"plot-{y}", **({"y_lim": [0, None]} if kind == "bar" else {}))
                for y in ys
            ]
        with gr.Accordion("Rows", open=False):
            table = gr.Dataframe(interactive=False, show_search="filter", elem_id="rows", max_height=400)
        new = grid(live.columns)
        parts = [words, *plots, table]

        def look() -> list[Any]:
            data = live.look()
            return [live.words, *(data for _ in plots), data.head(SHOWN)]

        same: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        blocks.load(look, None, parts, **same)
        gr.Timer(every).tick(look, None, parts, **same)
        new.write.click(lambda rows: add(live, rows), new.cells, new.cells, **same).then(look, None, parts, **same)
    return blocks


def add(live: Live, rows: pd.DataFrame) -> pd.DataFrame:
    """Puts rows into the outbox, which `Live.look` sends; the grid is empty then.

    Raises:
        gr.Error: no rows, or columns that the table does not have.
    """
    found = rows_of(rows)
    if not found:
        raise gr.Error("write a row first")
    names = list(dict.fromkeys(name for row in found for name in row))
    if unknown := [name for name in names if live.columns and name not in live.columns]:
        raise gr.Error(f"the table has no column {unknown[0]!r}; it has {', '.join(live.columns)}")
    live.outbox.add(found)
    return pd.DataFrame(columns=live.columns or names)
