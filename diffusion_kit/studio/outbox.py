"""Rows for a table that may not be reached: they wait in a file, and are sent once it is."""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from diffusion_kit.ledger.recorder import summary
from diffusion_kit.recipes.whole import write_whole

from .tables import Source, refuses


def columns_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row)


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
        self.folder, self.source = folder, source
        self.refused: str | None = None

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps rows, those with the same columns together; `send` sends them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max((int(file.stem.partition("-")[0]) for file in self.batches()), default=0) + 1
        for k, (_, batch) in enumerate(groupby(rows, key=columns_of)):
            file = self.folder / f"{number + k:09}-{uuid.uuid4().hex[:8]}.json"
            write_whole(file, json.dumps([dict(row) for row in batch], default=str).encode())

    def send(self) -> int:
        """Sends what waits, in its order; how many rows were taken.

        Raises:
            Exception: what the table's driver raises where it is not reached; what was not taken waits on.
        """
        taken = 0
        with self.alone():
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thread of one process at a time is inside: two dashboards of a table must not send the same rows."""
        if not self.folder.is_dir():
            yield
            return
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def batches(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def __len__(self) -> int:
        """Rows that wait."""
        count = 0
        for file in self.batches():
            with suppress(FileNotFoundError):  # sent meanwhile
                count += len(json.loads(file.read_text("utf-8")))
        return count
