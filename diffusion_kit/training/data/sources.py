"""Where training pictures come from: folders and lists of files. Tables and tars are in `tables` and `webdataset`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusion_kit.training.config import SourceConfig

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
TABLES = (".parquet", ".arrow")
Content = Path | bytes  # of an image file


@dataclass(frozen=True)
class Record:
    """One picture before anything is read.

    Attributes:
        name: tells a person which it is: a file, or a row.
        condition: the control image that comes with it, if one does.
        captions: one or several for the same picture.
        size: (width, height) in pixels, where the list says it.
    """

    name: str
    image: Content
    condition: Content | None
    captions: tuple[str, ...]
    size: tuple[int, int] | None = None


class Source(Protocol):
    """Records by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(settings: SourceConfig) -> Source:
    """
    Raises:
        FileNotFoundError: nothing there. ValueError: nothing usable, or a list that lacks a column.
    """
    path = Path(settings.path).expanduser()
    if path.suffix == ".tar":
        from .webdataset import open_tars

        return open_tars(settings)
    if not path.exists():
        raise FileNotFoundError(f"no data {path.absolute()}")
    if path.suffix == ".jsonl":
        return open_list(path, settings)
    if (path / "metadata.jsonl").is_file():
        return open_list(path / "metadata.jsonl", settings)
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise ValueError(f"{path} holds several tables, {splits}: name one of them, such as {path / 'train'}")
    if is_folder(path):
        return open_folder(path, settings)
    if path.is_file() and path.suffix not in TABLES:
        known = ", ".join((".jsonl", ".tar", *TABLES))
        raise ValueError(f"{path} is no data that is read: name a folder, or a file that ends with {known}")
    from .tables import open_table

    return open_table(settings)


def is_folder(path: Path) -> bool:
    """Whether it is a folder of pictures, without a list, and no table."""
    listed = any((path / name).is_file() for name in ("metadata.jsonl", "dataset_dict.json"))
    return path.is_dir() and not (listed or any(path.glob("*.arrow")) or any(path.glob("**/*.parquet")))


def open_list(file: Path, settings: SourceConfig) -> list[Record]:
    """A JSON object in each line; paths are relative to the file. The caption is a text or a list of texts."""
    records = []
    for number, line in enumerate(file.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict) or settings.image not in row:
            known = ", ".join(row) if isinstance(row, dict) else "no object"
            raise ValueError(f"{where} has no column {settings.image!r}; it has {known}: set image=NAME")
        image, condition, text = row[settings.image], row.get(settings.condition), row.get(settings.caption) or ""
        captions = (text,) if isinstance(text, str) else text
        texts = isinstance(captions, (list, tuple)) and all(isinstance(caption, str) for caption in captions)
        if not isinstance(image, str) or not isinstance(condition, (str, type(None))) or not texts:
            raise ValueError(f"{where}: image and condition must be the paths of files, the caption a text or several")
        size = size_of(row)
        control = None if condition is None else file.parent / condition
        records.append(Record(image, file.parent / image, control, tuple(captions) or ("",), size))
    return _some(records, file)


def size_of(row: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) in pixels, where both are told."""
    width, height = row.get("width"), row.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def open_folder(folder: Path, settings: SourceConfig) -> list[Record]:
    """Pictures of a folder and its subfolders; captions, a line each, in .txt files beside them."""
    conditions = folder / settings.condition
    files = pictures_in(folder, without=conditions)
    given = {file.relative_to(conditions).with_suffix(""): file for file in pictures_in(conditions)}
    records = []
    for file in files:
        name, text = file.relative_to(folder), file.with_suffix(".txt")
        lines = text.read_text("utf-8-sig", "replace").splitlines() if text.is_file() else []
        captions = tuple(line for line in lines if line.strip())
        records.append(Record(str(name), file, given.get(name.with_suffix("")), captions or ("",)))
    return _some(records, folder)


def pictures_in(folder: Path, without: Path | None = None) -> list[Path]:
    """Image files of a folder and its subfolders, sorted; through links to folders too, each folder once, and by a link
    only where it does not lie below as it is."""
    seen = set() if without is None else {os.path.realpath(without)}
    found, waiting = list[Path](), [folder]
    while waiting:
        links = []
        for place, below, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(place)) in seen:
                below.clear()
                continue
            seen.add(real)
            links += [Path(place, name) for name in below if os.path.islink(Path(place, name))]
            found += [file for name in names if (file := Path(place, name)).suffix.lower() in SUFFIXES]
        waiting += sorted(links)
    return sorted(found)


def _some(records: list[Record], where: Path) -> list[Record]:
    if not records:
        raise ValueError(f"{where} has no pictures: {', '.join(sorted(SUFFIXES))} are read")
    return records
