"""Small copies of pictures, made when they are first looked at."""

from __future__ import annotations

import io
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from diffusion_kit.adapters.pictures import load_image
from diffusion_kit.ledger.tables import Picture
from diffusion_kit.recipes.whole import write_whole

SIDE = 320  # pixels of the longer side
THREADS = 4


class Thumbs:
    """
    Args:
        folder: where they are kept, by the id of the picture's row and the time of its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, rows: Sequence[Picture]) -> list[Path | None]:
        """A file for each picture; None where it is not there, or cannot be read."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.one, rows))

    def one(self, row: Picture) -> Path | None:
        source = Path(row.file)
        if row.host != socket.gethostname():  # a file of that name may be here, too
            return None
        try:
            file = self.folder / f"{row.id}-{source.stat().st_mtime_ns}.webp"
            if not file.is_file():
                self.make(source, file)
        except (OSError, ValueError):
            return None
        return file

    def all_of(self, row: Picture) -> list[Path]:
        """Those that were made, of the picture as it is and as it was."""
        return list(self.folder.glob(f"{row.id}-*.webp"))

    def make(self, source: Path, file: Path) -> None:
        picture = load_image(source).convert("RGB")
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        file.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=80)
        write_whole(file, data.getbuffer())
