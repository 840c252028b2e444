"""A grid in which rows are written: typed, pasted from a spreadsheet, or of a CSV file; and what stands in it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")  # without zeros in front, which are of a name
DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "rows.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass
class Grid:
    """Parts of a page; `write` is a button of the caller's."""

    cells: Any
    write: Any


def grid(columns: Sequence[str]) -> Grid:
    """
    Args:
        columns: that it has at first; none, if they are not known.
    """
    script = Path(__file__).with_name("grid.js").read_text("utf-8")
    with gr.Accordion("Write rows", open=False, elem_id="writing"):
        cells = gr.Dataframe(
            headers=list(columns) or None,
            interactive=True,
            label="New rows: add and delete rows and columns, paste from a spreadsheet",
            elem_id="grid",
            max_height=400,
        )
        text = gr.Textbox(visible=False)
        clipboard = gr.HTML(
            "", html_template="<span></span>", js_on_load=script, elem_id="grid-clipboard", padding=False
        )
        with gr.Row():
            file = gr.UploadButton("From CSV", file_types=[".csv"], size="sm", elem_id="from-csv")
            out = gr.Button("To CSV", size="sm", elem_id="to-csv")
            write = gr.Button("Add to the table", size="sm", variant="primary", elem_id="write")
    same: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    clipboard.input(pasted, [cells, clipboard], cells, **same)
    file.upload(from_csv, file, cells, **same)
    out.click(to_csv, cells, text, **same).then(None, text, None, js=DOWNLOAD, **same)
    return Grid(cells, write)


def pasted(rows: pd.DataFrame, told: str) -> pd.DataFrame:
    """The grid with cells of a spreadsheet written into it, which grows with them.

    Args:
        told: JSON of the page: text with tabs and newlines, and the row and column where its first cell goes. A first line
            that repeats the columns' names is left out.
    """
    own = json.loads(told)
    lines = [line for line in csv.reader(io.StringIO(own["text"]), delimiter="\t") if line]
    names = [str(name) for name in rows.columns]
    table = rows.astype(object).where(rows.notna(), "").values.tolist()
    row, column = min(max(int(own["row"]), 0), len(table)), min(max(int(own["column"]), 0), max(len(names) - 1, 0))
    if lines and [name.strip() for name in lines[0]] == names[column : column + len(lines[0])]:
        lines = lines[1:]
    width = max([len(names), *(column + len(line) for line in lines)])
    names += [str(k + 1) for k in range(len(names), width)]
    table += [[] for _ in range(row + len(lines) - len(table))]
    table = [line + [""] * (width - len(line)) for line in table]
    for k, line in enumerate(lines, row):
        table[k][column : column + len(line)] = line
    return pd.DataFrame(table, columns=names)


def rows_of(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """What stands in a grid: rows with anything in them, numbers as numbers, without empty cells: what is not given is as
    the table says."""
    read = ({str(name): number(value) for name, value in row.items()} for row in rows.to_dict("records"))
    kept = ({name: value for name, value in row.items() if value is not None} for row in read)
    return [row for row in kept if row]


def number(value: Any) -> Any:
    """A cell's value: of text that is one, the number; None of an empty cell."""
    if value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        return value.item() if hasattr(value, "item") else value
    text = value.strip()
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if DECIMAL.fullmatch(text) else value


def from_csv(file: str) -> pd.DataFrame:
    """
    Raises:
        gr.Error: it is no CSV.
    """
    try:
        return pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own are ValueErrors
        raise gr.Error(f"this is no CSV file: {' '.join(str(error).split())}") from None


def to_csv(rows: pd.DataFrame) -> str:
    return str(rows.to_csv(index=False))
