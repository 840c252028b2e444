"""By what content a file is known, remembered by its size and time of change: a large data set is read for it once."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .sources import Record


class Known(NamedTuple):
    """A file as it was when its content was read."""

    file: str
    size: int
    time: int


class Keys:
    """Keys of pictures' bytes, whatever their names.

    Args:
        folder: where keys of files are kept, in lists that any number of processes may add; None for this process only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._keys: dict[Known, str] = {}
        self._new: list[tuple[Known, str]] = []
        for file in sorted(folder.glob("files-*.jsonl")) if folder is not None and folder.is_dir() else []:
            self._keys.update(_read(file))

    def of(self, record: Record) -> str:
        """Of a picture's bytes; a file is read if it is new or has changed."""
        if isinstance(record.image, bytes):
            return _key(record.image)
        path = os.path.abspath(record.image)
        found = os.stat(path)
        known = Known(path, found.st_size, found.st_mtime_ns)
        if known not in self._keys:
            self.note([(known, _key(record.image.read_bytes()))])
        return self._keys[known]

    def note(self, found: Iterable[tuple[Known, str]]) -> None:
        """Remembers what was read, by another process too."""
        own = list(found)
        self._keys.update(own)
        self._new += own

    def taken(self) -> list[tuple[Known, str]]:
        """What is new since this was last asked, for the process that keeps it."""
        own, self._new = self._new, []
        return own

    def flush(self) -> None:
        """Writes what is new."""
        own = self.taken()
        if self.folder is None or not own:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        beside = self.folder / f".{name}.part"
        beside.write_text("".join(json.dumps([*known, key]) + "\n" for known, key in own))
        os.replace(beside, self.folder / f"files-{name}.jsonl")


def _read(file: Path) -> dict[Known, str]:
    """A list that was damaged counts as far as it goes."""
    found = {}
    for line in file.read_text("utf-8", "replace").splitlines():
        try:
            path, size, time, key = json.loads(line)
        except ValueError:
            continue
        found[Known(path, size, time)] = key
    return found


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
