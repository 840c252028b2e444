"""Pictures that users give: checked, and kept under the hash of their bytes, so that a recipe can name them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from pathlib import Path

from PIL import Image

from diffusion_kit.adapters.pictures import MEGAPIXELS, load_image
from diffusion_kit.recipes import FileRef
from diffusion_kit.recipes.whole import write_whole

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


class Inputs:
    """
    Args:
        folder: where they are kept.
        largest: bytes of one at most.
    """

    def __init__(self, folder: Path, largest: int) -> None:
        self.folder, self.largest = folder, largest

    def add(self, data: bytes, name: str) -> FileRef:
        """Keeps a picture.

        Args:
            name: what errors call it.

        Raises:
            ValueError: it is too large, or no PNG, JPEG or WEBP that can be read.
        """
        if len(data) > self.largest:
            raise ValueError(f"{name} has {len(data) / 1e6:.1f} MB; at most {self.largest / 1e6:g} MB are taken")
        load_image(data, name=name)
        return self._keep(data)

    def _keep(self, data: bytes) -> FileRef:
        digest = hashlib.sha256(data).hexdigest()
        suffix = next((own for start, own in SUFFIXES.items() if data.startswith(start)), ".png")
        file = self.folder / f"{digest[:20]}{suffix}"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, data)
        return FileRef(str(file), digest)

    def add_base64(self, text: str, name: str) -> FileRef:
        """Keeps a picture in base64; see `decoded`."""
        return self.add(self.decoded(text, name), name)

    def decoded(self, text: str, name: str) -> bytes:
        """What is in base64, or in a data: URL; no other URL, and no path, is followed.

        Raises:
            ValueError: it is neither, or too large.
        """
        if text.startswith("data:"):
            text = text.partition(",")[2]
        if len(text) > self.largest * 4 // 3 + 8:
            raise ValueError(f"{name} is larger than the {self.largest / 1e6:g} MB that are taken")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"{name} must be a picture in base64; files and URLs are not followed") from None

    def add_picture(self, picture: Image.Image, name: str) -> FileRef:
        """Keeps what was drawn: as a PNG, which may have more bytes than what was uploaded.

        Raises:
            ValueError: it has more pixels than the kit reads.
        """
        if (pixels := picture.width * picture.height) > MEGAPIXELS * 1e6:
            raise ValueError(f"{name} has {pixels / 1e6:.1f} megapixels; at most {MEGAPIXELS} are read")
        data = io.BytesIO()
        picture.save(data, "PNG", compress_level=1)
        return self._keep(data.getvalue())
