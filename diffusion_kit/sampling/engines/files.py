"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        if not folder.is_dir():  # nobody was faster
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
