"""`diffusion-kit runs`: trainings that the history knows, and two of them side by side."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .table import columns, shortened

if TYPE_CHECKING:
    from diffusion_kit.ledger.tables import Run

SHOWN = ("loss", "validation/fidelity")  # figures in the list
WIDE = 60  # characters of a value, or of a note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", metavar="RUN", help="a run's id, folder or its name; `compare A B`: of two, what differs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.ledger import Ledger, runs

    with Ledger().reading() as session:
        match options.what:
            case []:
                rows = [listed(run, runs.state_of(run), runs.last(session, run.id)) for run in runs.found(session)]
                show_list(rows, options.json)
            case ["compare", first, second]:
                pair = [runs.find(session, name) for name in (first, second)]
                show_pair(pair, [runs.last(session, run.id) for run in pair], options.json)
            case [name]:
                found = runs.find(session, name)
                show_one(found, runs.state_of(found), runs.last(session, found.id), options.json)
            case _:
                raise ValueError("give nothing, one RUN, or `compare A B`")


def listed(run: Run, state: str, last: dict[str, float]) -> dict[str, Any]:
    return {
        "id": run.id,
        "state": state,
        "target": run.target,
        "step": f"{run.step}/{run.steps}",
        **{name.rpartition("/")[2]: last.get(name) for name in SHOWN},
        "started": f"{run.started.astimezone():%Y-%m-%d %H:%M}",
        "folder": run.folder,
        "notes": run.notes,
    }


def show_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print("no runs yet; diffusion-kit train makes them")
    else:
        print(columns([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]))


def show_one(run: Run, state: str, last: dict[str, float], as_json: bool) -> None:
    whole = listed(run, state, last) | {"command": run.command, "figures": last}
    if as_json:
        print(json.dumps(whole | {"config": run.config}, indent=2))
        return
    figures = whole.pop("figures")
    lines = {name: value for name, value in whole.items() if value not in ("", None)} | figures
    print(columns([(name, cell(value)) for name, value in lines.items()]))


def show_pair(pair: list[Run], last: list[dict[str, float]], as_json: bool) -> None:
    """What differs in the configurations, and the last figures of both."""
    from diffusion_kit.training.tree import leaves

    trees = [dict(leaves(run.config)) for run in pair]
    rows = []
    for kind, tables in (("setting", trees), ("figure", last)):
        for name in dict.fromkeys([*tables[0], *tables[1]]):
            values = [table.get(name) for table in tables]
            if kind == "figure" or values[0] != values[1]:
                rows.append({"kind": kind, "name": name, "a": values[0], "b": values[1]})
    if as_json:
        print(json.dumps({"a": pair[0].id, "b": pair[1].id, "rows": rows}, indent=2))
        return
    head = ["", *(f"{run.id} {shortened(run.folder.rpartition('/')[2], WIDE)}" for run in pair)]
    print(columns([head, *([row["name"], cell(row["a"]), cell(row["b"])] for row in rows)]))


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else shortened(" ".join(str(value).split()), WIDE)
