"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: Any, *, new: bool = False) -> None:
    """Writes bytes beside their place and renames them, under a name that no other process and no other thread takes.

    Raises:
        FileExistsError: there is a file at the place, which must be `new`; of two that write there one gets it.
    """
    beside = path.with_name(
        f".{os.getpid()}-{threading.get_ident()}-{uuid.uuid4().hex[:8]}.part"
    )  # not longer than a name
    try:
        beside.write_bytes(data)
        if new:
            _put(beside, path)
        else:
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _put(beside: Path, path: Path) -> None:
    """A file under a name that nobody has."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # not every disk can: an empty file stands there as long as a rename takes
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(beside, path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
