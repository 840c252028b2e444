"""What a command writes to the history, unless it is told not to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from diffusion_kit.ledger import Recorder


def add_history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-history", action="store_true", help="write nothing of this to the history")


@contextmanager
def remembering(options: argparse.Namespace) -> Iterator[Recorder]:
    from diffusion_kit.ledger import Recorder

    recorder = Recorder(note, on=not options.no_history)
    try:
        yield recorder
    finally:
        recorder.close()
