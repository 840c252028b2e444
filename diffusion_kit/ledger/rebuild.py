"""Makes the ledger again from what it tells of: run folders, reports, and the recipes in pictures.

Rows are written as they were written first, over those that are there: notes, favourites, ratings and tags, which stand in
the ledger alone, stay.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from diffusion_kit.recipes import Recipe, read
from diffusion_kit.recipes.files import FORMATS

from . import evaluations, pictures, runs
from .database import Ledger, parsed
from .folders import LOGS, RUN, about, config_of, lines_of
from .place import ledger_url, places
from .recorder import summary
from .tables import Picture, Run

COPIES = ("cache", "inputs", "shown", "thumbs", "zips")  # folders of a studio
AT_ONCE = 200  # files in a transaction


def rebuild(folders: Iterable[Path], say: Callable[[str], None], url: str | None = None) -> Counter[str]:
    """Reads the folders that are given with all below them, and those in which the kit made something; how many runs,
    pictures and reports were found. A database that is broken is put aside.

    Raises:
        FileNotFoundError: a folder that is given is not there.
    """
    given = list(folders)
    for folder in given:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
    ledger = opened(url, say)
    counts: Counter[str] = Counter()
    try:
        for batch in batches(files_of(given)):
            with ledger.writing() as session:
                for file in batch:
                    counts[add(session, file, say)] += 1
    finally:
        ledger.close()
    del counts[""]
    return counts


def opened(url: str | None, say: Callable[[str], None]) -> Ledger:
    try:
        ledger = Ledger(url)
        if is_whole(ledger):
            return ledger
        ledger.close()
    except DatabaseError as error:
        if not is_broken(error):
            raise
    place = parsed(url or ledger_url())
    aside = f"{place.database}.broken-{datetime.now():%Y%m%d-%H%M%S}"
    for end in ("", "-wal", "-shm"):
        if Path(f"{place.database}{end}").exists():
            os.replace(f"{place.database}{end}", f"{aside}{end}")
    say(f"{place.database} is broken; it is now {aside}, which alone has the marks and notes")
    return Ledger(url)


def is_whole(ledger: Ledger) -> bool:
    """Whether every page of an SQLite file is as it should be; a server looks after its own."""
    if ledger.url.get_backend_name() != "sqlite":
        return True
    with ledger.engine.connect() as connection:
        return connection.execute(text("PRAGMA quick_check(1)")).scalar() == "ok"


def is_broken(error: DatabaseError) -> bool:
    """Whether it says that an SQLite file is none, or damaged."""
    told = str(error.orig) if isinstance(error.orig, sqlite3.Error) else ""
    return "not a database" in told or "malformed" in told


def files_of(given: Iterable[Path]) -> Iterator[Path]:
    """Every file that may be of use, once. Of the places only runs are walked down: others may be large."""
    seen: set[Path] = set()
    known = [Path(place) for place in places() if Path(place).is_dir()]
    walks = [folder.absolute().rglob("*") for folder in given]
    walks += [place.rglob("*") if (place / RUN).is_file() else place.iterdir() for place in known]
    for walk in walks:
        for file in sorted(walk):
            if file not in seen and file.is_file() and not is_copy(file):
                seen.add(file)
                yield file


def is_copy(file: Path) -> bool:
    """Whether a studio keeps it beside its pictures: what was given to it, and what its pages were sent."""
    return any(own.name in COPIES and (own.parent / ".browser").is_file() for own in file.parents)


def batches(files: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for file in files:
        batch.append(file)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    yield batch


def add(session: Session, file: Path, say: Callable[[str], None]) -> str:
    """Writes what a file tells; what it was, or nothing."""
    try:
        with session.begin_nested():  # of a file all, or nothing
            if file.name == RUN:
                return add_run(session, file.parent)
            if file.name == evaluations.REPORT:
                return add_report(session, file)
            if file.suffix.lower() in FORMATS:
                return add_picture(session, file)
    except (OperationalError, InterfaceError):  # the database's, not the file's
        raise
    except SQLAlchemyError as error:
        if isinstance(error, DatabaseError) and is_broken(error):
            raise
        say(f"{file} is left out: {summary(error)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        say(f"{file} is left out: {' '.join(str(error).split())}")
    return ""


def made_at(file: Path) -> datetime:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC)


def add_picture(session: Session, file: Path) -> str:
    if (sheet := run_of_sheet(file)) is not None:
        return add_sheet(session, file, *sheet)
    try:
        recipe = read(file)
    except ValueError:  # pictures of others
        return ""
    if not isinstance(recipe, Recipe):
        return ""
    old = session.get(Picture, pictures.id_of(file))
    pictures.add(session, file, recipe, old.source if old else pictures.GENERATE, old.made if old else made_at(file))
    return "pictures"


def run_of_sheet(file: Path) -> tuple[Path, int] | None:
    """Folder and step of the run whose validation made a sheet: OUTPUT/validation/step-00001000/unseen.png."""
    folder, _, number = file.parent.name.partition("-")
    own = file.parents[2] if len(file.parents) > 2 else file.parent
    fits = file.parents[1].name == "validation" and folder == "step" and number.isdecimal() if own else False
    return (own, int(number)) if fits and (own / RUN).is_file() else None


def add_sheet(session: Session, file: Path, folder: Path, step: int) -> str:
    pictures.add_sheet(session, file, pictures.sheet(file, config_of(folder), about(folder)["id"], step))
    return "pictures"


def add_report(session: Session, file: Path) -> str:
    sheet = run_of_sheet(file.parent)  # OUTPUT/validation/step-00001000/unseen/report.json
    own: dict[str, Any] = {} if sheet is None else {"run": about(sheet[0])["id"], "step": sheet[1]}
    evaluations.add_file(session, file, **own)
    return "reports"


def add_run(session: Session, folder: Path) -> str:
    """A run that the ledger knows to be alive is left to it."""
    own = about(folder)
    known = session.get(Run, own["id"])
    if known is not None and runs.state_of(known) == runs.RUNNING:
        return ""
    config = config_of(folder)
    row = own | {"folder": str(folder.absolute()), "target": config["target"], "config": config, "step": 0}
    row["steps"] = config["steps"]
    runs.begin(session, row)
    for line in (line for name in LOGS for line in lines_of(folder / f"{name}.jsonl")):
        runs.log(session, row | {"step": line["step"]}, {key: line[key] for key in line if key != "step"})
    runs.end(session, own["id"], runs.ENDED if (folder / "result").is_dir() else runs.STOPPED)
    return "runs"
