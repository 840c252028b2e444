"""Pictures that no training has seen, and what is asked with them.

`python scripts/make_default/conditions.py` writes a picture of each held-out concept, and the list that
`diffusion-kit evaluate --conditions LIST --photos` reads, into `runs/make_default/data/conditions/`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import drawings
import numpy as np
import pictures
from pictures import COLOURS, DATA, SIZE
from PIL import Image

FOLDER = DATA / "conditions"
VENDOR = drawings.HERE.parents[1] / "runs/make_default/npm/node_modules/@iconify-json/twemoji/icons.json"
INSIDE = 54  # px, as most drawings stand in training
STYLES, SEEDS = ("noto", "3d"), 5  # in which the measured concepts are asked for


pool = cache(drawings.load)


@dataclass(frozen=True)
class Asked:
    """What a picture is asked for by its prompt.

    Attributes:
        seed: of its noise.
        pixels: a picture of it, (64, 64, 3) uint8, where there is one.
    """

    slug: str
    style: str
    word: str
    background: str
    seed: int = 0
    pixels: Any = None

    @property
    def prompt(self) -> str:
        return f"{self.style} emoji of {self.word} on a {self.background} background"

    @property
    def new(self) -> bool:
        """Whether the concept was never trained on this background."""
        return self.background in drawings.measured().get(self.slug, ())


def lay(pixels: np.ndarray, background: str) -> np.ndarray:
    """A drawing, (64, 64, 4) uint8, in the middle of a named colour: (64, 64, 3) uint8."""
    canvas = np.broadcast_to(np.float32(COLOURS[background]) / 255, (SIZE, SIZE, 3)).copy()
    pictures.place(canvas, pixels, INSIDE, (SIZE - INSIDE) // 2, (SIZE - INSIDE) // 2)
    return (canvas * 255 + 0.5).astype(np.uint8)


def grounds(pixels: np.ndarray, kept: Sequence[str] = ()) -> list[str]:
    """The colours on which a drawing shows, but those kept from it."""
    hidden = {*kept, pictures.hue_of(pixels)}
    return [name for name in COLOURS if name not in hidden]


def background_of(number: int, pixels: np.ndarray) -> str:
    """One of them, by turns."""
    names = grounds(pixels)
    return names[number % len(names)]


def measured() -> list[Asked]:
    """100 concepts, two styles, five seeds: half of them, by turns, on backgrounds never trained with the concept."""
    drawn = {(drawing.style, drawing.slug): drawing.pixels for drawing in pool()}
    asked = []
    for number, (slug, kept) in enumerate(drawings.measured().items()):
        for turn, style in enumerate(STYLES):
            trained = grounds(drawn[style, slug], kept)
            for seed in range(SEEDS):
                names = kept if (number + turn + seed) % 2 == 0 else trained
                background = names[(number + seed // 2) % len(names)]
                asked.append(Asked(slug, style, drawings.words()[slug], background, len(asked)))
    return asked


def held_out() -> list[Asked]:
    """One picture of each of the 64 concepts of `held_out.txt`, styles and backgrounds by turns.

    The words pig and whale were trained all the same: of a pig's face and a spouting whale.
    """
    having = defaultdict(list)
    for drawing in pool():
        having[drawing.slug].append(drawing)
    asked = []
    for number, slug in enumerate(sorted(drawings.held_out())):
        drawing = having[slug][number % len(having[slug])]
        background = background_of(number, drawing.pixels)
        own = lay(drawing.pixels, background)
        asked.append(Asked(slug, drawing.style, drawing.label.lower(), background, number, own))
    return asked


@cache
def strangers() -> dict[str, np.ndarray]:
    """Slug to drawing, (64, 64, 4) uint8, of each word of `concepts.txt` by a vendor whom no training saw.

    Twemoji (CC-BY 4.0) is measured with only: nothing of it is kept.
    """
    icons = json.loads(VENDOR.read_text())
    return {slug: drawings.render(icons, slug) for slug in drawings.words() if slug in icons["icons"]}


def strange() -> list[Asked]:
    """The measured concepts as the stranger draws them, once in each of the two styles."""
    asked = []
    for slug in drawings.measured():
        for style in STYLES:
            pixels = strangers()[slug]
            background = background_of(len(asked), pixels)
            asked.append(Asked(slug, style, drawings.words()[slug], background, len(asked), lay(pixels, background)))
    return asked


def write(folder: Path, rows: Sequence[tuple[str, str, Image.Image]]) -> Path:
    """Names, captions and pictures as `diffusion-kit evaluate` reads them; the list comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, _, picture in rows:
        picture.save(folder / f"{name}.png")
    lines = [json.dumps({"image": f"{name}.png", "caption": caption}) for name, caption, _ in rows]
    (folder / "conditions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "conditions.jsonl"


def write_held_out() -> Path:
    return write(FOLDER, [(own.slug, own.prompt, Image.fromarray(own.pixels)) for own in held_out()])


if __name__ == "__main__":
    print(write_held_out())
