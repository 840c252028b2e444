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

import drawings
import numpy as np
import pictures
from pictures import COLOURS, DATA, SIZE
from PIL import Image

FOLDER = DATA / "conditions"
VENDOR = drawings.HERE.parents[1] / "runs/make_default/npm/node_modules/@iconify-json/twemoji/icons.json"
INSIDE = 54  # px, as most drawings stand in training


@dataclass(frozen=True)
class Asked:
    """A prompt, the word and the background that it names, and a picture of it, (64, 64, 3) uint8, where there is one."""

    name: str
    prompt: str
    word: str
    background: str
    pixels: np.ndarray | None = None


def prompt_of(style: str, word: str, background: str) -> str:
    return f"{style} emoji of {word} on a {background} background"


def lay(pixels: np.ndarray, background: str) -> np.ndarray:
    """A drawing, (64, 64, 4) uint8, in the middle of a named colour: (64, 64, 3) uint8."""
    canvas = np.broadcast_to(np.float32(COLOURS[background]) / 255, (SIZE, SIZE, 3)).copy()
    pictures.place(canvas, pixels, INSIDE, (SIZE - INSIDE) // 2, (SIZE - INSIDE) // 2)
    return (canvas * 255 + 0.5).astype(np.uint8)


def background_of(number: int, pixels: np.ndarray, names: Sequence[str] = tuple(COLOURS)) -> str:
    """The colours by turns, but never the drawing's own."""
    free = [name for name in names if name != pictures.hue_of(pixels)]
    return free[number % len(free)]


def held_out() -> list[Asked]:
    """One picture of each of the 64 concepts of `held_out.txt`, styles and backgrounds by turns."""
    having = defaultdict(list)
    for drawing in drawings.load():
        having[drawing.slug].append(drawing)
    asked = []
    for number, slug in enumerate(sorted(drawings.held_out())):
        drawing = having[slug][number % len(having[slug])]
        background = background_of(number, drawing.pixels)
        prompt = prompt_of(drawing.style, drawing.label.lower(), background)
        asked.append(Asked(slug, prompt, drawing.label.lower(), background, lay(drawing.pixels, background)))
    return asked


@cache
def strangers() -> dict[str, np.ndarray]:
    """Slug to drawing, (64, 64, 4) uint8, of each word of `concepts.txt` by a vendor whom no training saw.

    Twemoji (CC-BY 4.0) is measured with only: nothing of it is kept.
    """
    icons = json.loads(VENDOR.read_text())
    return {slug: drawings.render(icons, slug) for slug in drawings.words() if slug in icons["icons"]}


def strange() -> list[Asked]:
    """The measured concepts as the stranger draws them, asked for in the two styles by turns."""
    asked = []
    for number, slug in enumerate(drawings.measured()):
        pixels, word = strangers()[slug], drawings.words()[slug]
        background = background_of(number, pixels)
        prompt = prompt_of(("noto", "3d")[number % 2], word, background)
        asked.append(Asked(slug, prompt, word, background, lay(pixels, background)))
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
    return write(FOLDER, [(own.name, own.prompt, Image.fromarray(own.pixels)) for own in held_out()])


if __name__ == "__main__":
    print(write_held_out())
