"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path | None]:
    """A new folder to be filled, which then gets the name; None where a folder of that name is there."""
    if folder.is_dir():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        if not folder.is_dir():  # nobody was faster
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
