"""`diffusion-kit history`: pictures that were made, searched; and the history made again from files."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note
from .table import columns, shortened

if TYPE_CHECKING:
    from diffusion_kit.ledger.tables import Picture

LIMIT = 20
WIDE = 60  # characters of a prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("words", nargs="*", metavar="WORD", help="each stands in the prompt, the tags or the file's name")
    add("--control", default="", metavar="NAME", help="made under this control")
    add("--model", default="", help="made by this model")
    add("--source", default="", choices=("studio", "api", "generate", "run"), help="who made it")
    add("--favourites", action="store_true", help="only those")
    add("--rating", type=int, default=0, metavar="N", help="at least so many stars")
    add("--since", metavar="DATE", help="made on this day (2026-11-30) or later")
    add("--limit", type=int, default=LIMIT, metavar="N", help=f"so many, the newest first; by default {LIMIT}")
    add("--json", action="store_true", help="a JSON object a line in place of a table")
    add(
        "--rebuild",
        nargs="*",
        metavar="FOLDER",
        help="make the history again from run folders and recipes in pictures: of every FOLDER with all below it, and of "
        "those in which the kit made something",
    )


def run(options: argparse.Namespace) -> None:
    if options.rebuild is not None:
        rebuild([Path(folder) for folder in options.rebuild])
        return
    from diffusion_kit.ledger import Ledger, pictures

    since = None if options.since is None else day(options.since)
    given = {name: getattr(options, name) for name in ("control", "model", "source", "rating")}
    query = pictures.Query(words=" ".join(options.words), favourite=options.favourites, since=since, **given)
    with Ledger().reading() as session:
        found = pictures.search(session, query, limit=options.limit)
        count = pictures.count(session, query)
    if options.json:
        for picture in found:
            print(json.dumps(listed(picture)))
    elif found:
        print(columns([list(listed(found[0])), *(cells(picture) for picture in found)]))
    if len(found) < count and not options.json:
        note(f"{len(found)} of {count} pictures; --limit shows more")
    if not found:
        note("no picture fits" if count == 0 else "--limit is 0")


def rebuild(folders: list[Path]) -> None:
    from diffusion_kit.ledger.rebuild import rebuild

    counts = rebuild(folders, note)
    print(", ".join(f"{counts[what]} {what}" for what in ("runs", "pictures", "reports")))


def day(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise ValueError(f"--since is {text!r}; it must be a date such as 2026-11-30") from None


def listed(picture: Picture) -> dict[str, Any]:
    return {
        "made": f"{picture.made.astimezone():%Y-%m-%d %H:%M}",
        "file": picture.file,
        "prompt": picture.prompt,
        "controls": ", ".join(f"{control.kind} {control.scale}" for control in picture.controls),
        "model": picture.model,
        "seed": picture.seed,
        "source": picture.source,
        "marks": "♥" * picture.favourite + "★" * picture.rating,
    }


def cells(picture: Picture) -> list[Any]:
    row = listed(picture)
    row["prompt"] = shortened(row["prompt"], WIDE)
    return ["-" if value is None else value for value in row.values()]
