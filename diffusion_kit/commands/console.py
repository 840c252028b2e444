"""What a command says beside its result: one line each, on the error stream."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_kit.recipes.recipe import printable

PACKAGE = str(Path(__file__).parents[1])


_kept: list[list[str]] = []  # notes of the blocks that keep them


def note(text: str) -> None:
    if _kept:
        _kept[-1].append(text)
    else:
        print(f"diffusion-kit: {printable(' '.join(text.split()))}", file=sys.stderr)


@contextmanager
def kept_notes() -> Iterator[list[str]]:
    """Notes inside the block are put into the list, for another process to say."""
    _kept.append([])
    try:
        yield _kept[-1]
    finally:
        _kept.pop()


def show_warnings(debug: bool) -> None:
    """Warnings of the kit as notes; those of the libraries below only in `debug`."""

    def show(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
        if debug or (filename.startswith(PACKAGE) and category is UserWarning):
            note(str(message))

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("default")
    if not debug:
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
