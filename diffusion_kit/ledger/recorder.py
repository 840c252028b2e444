"""`Recorder`: writes to the ledger for those whom a database must not stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from diffusion_kit.recipes import Recipe

from . import evaluations, pictures
from .database import Ledger
from .place import remember

PAUSE = 60.0  # seconds after a failure in which nothing is tried
MOST = 10_000  # writings that wait; older ones are left to `history --rebuild`
UNREACHED = (OperationalError, InterfaceError, OSError)  # locked, full, away: it may be better later


class Recorder:
    """Writings that fail are told once, wait, and are done later; the database is opened when it is first written to.

    Every writing can be done twice: its rows have keys made from what they tell of.

    Args:
        say: told that the ledger fails, and that it is written to again.
        url: as of `Ledger`.
        on: whether anything is written.
    """

    def __init__(self, say: Callable[[str], None], url: str | None = None, *, on: bool = True) -> None:
        self.say, self.url, self.on = say, url, on
        self.ledger: Ledger | None = None
        self.waiting: deque[Callable[[Session], None]] = deque(maxlen=MOST)
        self.failing, self.next = False, 0.0

    def __call__(self, write: Callable[[Session], None]) -> None:
        if not self.on:
            return
        self.waiting.append(write)
        if time.monotonic() >= self.next:
            self.flush()

    def picture(self, file: Path, recipe: Recipe, source: str = pictures.GENERATE) -> None:
        """Writes a picture that was made now."""
        self.place(file.parent)
        now = datetime.now(UTC)
        self(lambda session: pictures.add(session, file, recipe, source, now))

    def report(self, folder: Path) -> None:
        """Writes an evaluation's report."""
        self.place(folder)
        self(lambda session: evaluations.add_file(session, folder / evaluations.REPORT))

    def place(self, folder: Path) -> None:
        """Remembers a folder of pictures, runs or reports."""
        if self.on:
            with suppress(OSError, ValueError):  # a disk that is full has been told by whoever wrote the picture
                remember(folder)

    def flush(self) -> None:
        """Writes what waits, in its order, as far as the database lets."""
        try:
            self.ledger = self.ledger or Ledger(self.url)
        except Exception as error:  # whatever a driver, a disk or a network has
            self._failed(error)
            return
        while self.waiting:
            try:
                with self.ledger.writing() as session:
                    self.waiting[0](session)
            except Exception as error:
                self._failed(error)
                if isinstance(error, UNREACHED):
                    return
            self.waiting.popleft()  # done, or never to be done: what cannot be written must not hold up the others
        if self.failing and time.monotonic() >= self.next:
            self.say("the history is written to again, with what it missed")
            self.failing = False

    def _failed(self, error: Exception) -> None:
        self.next = time.monotonic() + PAUSE
        if not self.failing:
            self.say(
                f"the history cannot be written ({summary(error)}); all else goes on, and "
                "`diffusion-kit history --rebuild` adds what it misses"
            )
        self.failing = True

    def close(self) -> None:
        """Tries once more what waits."""
        if self.waiting:
            self.flush()
        if self.ledger is not None:
            self.ledger.close()


def summary(error: Exception) -> str:
    """The first line of an error; SQLAlchemy's and drivers' go on for many. None of them holds a password."""
    origin = getattr(error, "orig", None) or error
    lines = str(origin).splitlines()
    return lines[0] if lines else type(origin).__name__
