"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 24 * 3600  # seconds without a change, after which nobody fills a new folder any more


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """A new folder to be filled, which then gets the name; None where a folder of that name is there."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name.partition('-')[0]}-*"):  # by a process that was killed
        with suppress(FileNotFoundError):  # it has its name by now
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    new = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    new.mkdir()  # readable for whom new folders are: a cache may be of several users
    try:
        yield new
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():  # else somebody was faster
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
