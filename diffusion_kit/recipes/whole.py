"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: Any) -> None:
    """Writes bytes beside their place and renames them, under a name that no other process and no other thread takes."""
    beside = path.with_name(
        f".{os.getpid()}-{threading.get_ident()}-{uuid.uuid4().hex[:8]}.part"
    )  # not longer than a name
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
