"""Rows for a table that may not be reached: they wait in a file, and are sent once it is."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import Source


class Outbox:
    """Every batch of rows is a file, which is removed when the table has taken it. A batch whose answer was lost is sent
    again: the table leaves out the rows whose primary key it has.

    Args:
        folder: of the batches of this table.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source, self.lock = folder, source, threading.Lock()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps rows; `send` sends them."""
        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((int(file.stem.partition("-")[0]) for file in self.batches()), default=0) + 1
        file = self.folder / f"{number:09}-{uuid.uuid4().hex[:8]}.json"
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps([dict(row) for row in rows], default=str), "utf-8")
        os.replace(beside, file)

    def send(self) -> int:
        """Sends what waits, in its order; how many rows were taken.

        Raises:
            Exception: what the table's driver raises where it is not reached; what was not taken waits on.
        """
        taken = 0
        with self.lock:
            for file in self.batches():
                rows = json.loads(file.read_text("utf-8"))
                self.source.insert(rows)
                file.unlink()
                taken += len(rows)
        return taken

    def batches(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def __len__(self) -> int:
        """Rows that wait."""
        return sum(len(json.loads(file.read_text("utf-8"))) for file in self.batches())
