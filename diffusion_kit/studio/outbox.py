"""Rows for a table that may not be reached: they wait in a file, and are sent once it is."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_kit.ledger.recorder import summary

from .tables import Source, refuses


class Outbox:
    """Every batch of rows is a file, which is removed when the table has taken it. A batch whose answer was lost is sent
    again: the table leaves out the rows whose primary key it has. One that the table refuses is laid aside, so that it does
    not hold up the others.

    Args:
        folder: of the batches of this table.

    Attributes:
        refused: what was laid aside last, and why.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source, self.lock = folder, source, threading.Lock()
        self.refused: str | None = None

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
                try:
                    self.source.insert(rows)
                except Exception as error:
                    if not refuses(error):
                        raise
                    aside = file.rename(file.with_suffix(".refused"))
                    self.refused = f"{len(rows)} rows were refused ({summary(error)}): they are in {aside}"
                else:
                    file.unlink()
                    taken += len(rows)
        return taken

    def batches(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def __len__(self) -> int:
        """Rows that wait."""
        return sum(len(json.loads(file.read_text("utf-8"))) for file in self.batches())
