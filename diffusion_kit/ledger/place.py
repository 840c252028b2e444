"""Where the kit keeps what it remembers.

DIFFUSION_KIT_HOME     the folder; by default ~/.diffusion_kit
DIFFUSION_KIT_LEDGER   URL of the database; by default the file ledger.db in that folder
"""

from __future__ import annotations

import os
from pathlib import Path

HOME, LEDGER = "DIFFUSION_KIT_HOME", "DIFFUSION_KIT_LEDGER"
PLACES = "places.txt"  # folders of pictures and runs, a line each: by them a lost database is made again


def home() -> Path:
    return Path(os.environ.get(HOME) or "~/.diffusion_kit").expanduser().absolute()


def ledger_url() -> str:
    return os.environ.get(LEDGER) or f"sqlite:///{home() / 'ledger.db'}"


def remember(folder: Path) -> None:
    """Notes a folder in which something was made, once."""
    file, line = home() / PLACES, str(folder.absolute())
    if line not in places():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(f"{line}\n")


def places() -> list[str]:
    file = home() / PLACES
    lines = file.read_text("utf-8", "surrogateescape").splitlines() if file.is_file() else []
    return list(dict.fromkeys(lines))
