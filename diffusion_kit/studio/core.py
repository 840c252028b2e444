"""What the page and the HTTP interface share: the library, the inputs, the queue, the workshop and the ledger."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.exc import SQLAlchemyError

from diffusion_kit.ledger import Ledger, Recorder, pictures
from diffusion_kit.ledger.recorder import summary
from diffusion_kit.recipes.whole import write_whole

from .config import StudioConfig
from .inputs import Inputs
from .library import Library
from .queue import Job, Queue
from .requests import Asked
from .workshop import Result, Workshop

FORESEEN = (ValueError, TypeError, FileNotFoundError, PermissionError, ImportError, SQLAlchemyError)


class Core:
    def __init__(self, config: StudioConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.library = Library(config.models, config.controls)
        self.inputs = Inputs(config.inputs, int(config.upload * 1e6))
        self.recorder = Recorder(say, on=config.history)
        self.workshop = Workshop(config, self.library, self.recorder)
        self.queue = Queue(config.queue, explain)
        self._ledger: Ledger | None = None
        self._opening = threading.Lock()

    def submit(
        self, asked: Asked, owner: str, *, source: str = pictures.STUDIO, watched: bool = False, measured: bool = False
    ) -> Job:
        """
        Raises:
            Full: the queue takes no more.
        """

        def work(job: Job) -> Result:
            return self.workshop.make(asked, job, source, measured=measured)

        return self.queue.submit(owner, work, watched=watched)

    def submit_preview(self, asked: Asked, number: int, owner: str) -> Job:
        """Of the image of one control, as its network will see it.

        Raises:
            Full: the queue takes no more.
        """
        return self.queue.submit(owner, lambda job: self.workshop.control_image(asked, number))

    def shown(self, file: Path) -> str:
        """A picture as the page may show it: in the studio's own folder, by a copy of one that lies elsewhere."""
        file = file.absolute()
        if file.resolve().is_relative_to(self.config.output.resolve()) or not file.is_file():
            return str(file)
        copy = self.copy_of(file)
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_whole(copy, file.read_bytes())
        return str(copy)

    def copy_of(self, file: Path) -> Path:
        """Where the copy is of one that lies elsewhere."""
        time = file.stat().st_mtime_ns if file.is_file() else 0
        key = hashlib.sha256(f"{file.absolute()} {time}".encode()).hexdigest()[:20]
        return self.config.output / "shown" / f"{key}{file.suffix.lower()}"

    @property
    def ledger(self) -> Ledger:
        """Opened when it is first looked at.

        Raises:
            ValueError, sqlalchemy.exc.SQLAlchemyError: it cannot be opened; the next look tries again.
        """
        with self._opening:
            self._ledger = self._ledger or Ledger()
        return self._ledger

    def close(self) -> None:
        self.queue.close()
        self.recorder.close()
        if self._ledger is not None:
            self._ledger.close()


def explain(error: Exception) -> str:
    """A line for who reads a page: without the dashes of the command line's options."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device has not enough memory: make a smaller picture, with fewer controls, or start with --low-memory"
        )
    if isinstance(error, SQLAlchemyError):
        return f"the history is not reached ({summary(error)}): all else goes on"
    if isinstance(error, FORESEEN):
        return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", " "), str(error))
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def dumped(result: Result) -> dict[str, Any]:
    """A result in JSON."""
    recipe = result.recipe
    return {
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "width": recipe.width,
        "height": recipe.height,
        "seconds": round(result.seconds, 3),
        "controls": len(result.shown),
        "fidelity": [{"measure": name, "value": value} for name, value in result.fidelity],
        "warnings": list(result.told),
        "command": result.command,
        "python": result.python,
    }
