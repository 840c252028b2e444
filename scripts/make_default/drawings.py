"""The drawings: three icon sets rendered once, kept in the repository, and what they are called.

`python scripts/make_default/drawings.py` renders from npm packages (see README.md) into `drawings/`: one lossless WebP for
each set, a grid of 64 px drawings with alpha, and `names.json`. All else here is for those who read them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
STORE = HERE / "drawings"
SIDE, COLUMNS = 64, 32

STYLES = {"noto": "noto", "3d": "fluent-emoji", "flat": "fluent-emoji-flat"}  # word in captions: npm package
GROUPS = {3, 4, 5, 6, 7}  # of Emojibase: animals, food, places, activities, objects; no people, symbols, flags
EXTRA = {"red-heart", "ghost", "robot", "alien", "skull"}
CLOCKS = re.compile(r"(o-?clock|-thirty)$")


@dataclass(frozen=True)
class Drawing:
    """`pixels` is (64, 64, 4) uint8 with straight alpha; `label` its Unicode name."""

    slug: str
    style: str
    label: str
    pixels: np.ndarray


def load() -> list[Drawing]:
    """Every drawing, in the order of styles and slugs."""
    names: dict[str, dict[str, str]] = json.loads((STORE / "names.json").read_text())
    return [
        Drawing(slug, style, label, pixels)
        for style, labels in names.items()
        for (slug, label), pixels in zip(labels.items(), cut(STORE / f"{style}.webp", len(labels)), strict=True)
    ]


def cut(sheet: Path, count: int) -> np.ndarray:
    """(count, 64, 64, 4) of a grid of drawings."""
    grid = np.asarray(Image.open(sheet).convert("RGBA"))
    rows = len(grid) // SIDE
    return grid.reshape(rows, SIDE, COLUMNS, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 4)[:count]


@cache
def words() -> dict[str, str]:
    """Slug to word in captions, of `concepts.txt`."""
    return {slug: word for slug, word, _ in _concepts()}


def common() -> set[str]:
    """The starred slugs of `concepts.txt`."""
    return {slug for slug, _, starred in _concepts() if starred}


def _concepts() -> list[tuple[str, str, bool]]:
    lines = [line for line in (HERE / "concepts.txt").read_text().splitlines() if not line.startswith("#")]
    parts = [(line.lstrip("* ").partition(":"), line.startswith("*")) for line in lines]
    return [(slug.strip(), (word or slug.replace("-", " ")).strip(), starred) for (slug, _, word), starred in parts]


def held_out() -> set[str]:
    """Slugs that no training sees in any style, of `held_out.txt`."""
    return set((HERE / "held_out.txt").read_text().split())


def measured() -> dict[str, tuple[str, ...]]:
    """Slug of each measured concept to the backgrounds that it is never trained on, of `measured.txt`."""
    lines = [line for line in (HERE / "measured.txt").read_text().splitlines() if not line.startswith("#")]
    return {slug: tuple(colours.split()) for slug, _, colours in (line.partition(": ") for line in lines)}


def slug_of(label: str) -> str:
    """A Unicode name as the icon sets spell it."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


def render(icons: dict, slug: str) -> np.ndarray:
    """One icon of a set, square, (64, 64, 4) uint8."""
    import resvg_py

    icon = icons["icons"][slug]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    svg = f'<svg {space} viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE)
    large = np.asarray(Image.open(BytesIO(bytes(png))).convert("RGBA")).astype(np.float32) / 255
    large[..., :3] *= large[..., 3:]  # halving premultiplied floats leaves no halo
    small = large.reshape(SIDE, 2, SIDE, 2, 4).mean((1, 3))
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return (small * 255 + 0.5).astype(np.uint8)


def main(packages: Path) -> None:
    """
    Args:
        packages: the `node_modules` folder with `@iconify-json/*` and `emojibase-data`.
    """
    emojis = json.loads((packages / "emojibase-data/en/data.json").read_text())
    labels = {slug_of(e["label"]): e["label"] for e in emojis if e.get("group") in GROUPS}
    labels |= {slug: slug.replace("-", " ") for slug in EXTRA}
    wanted = sorted(slug for slug in labels if not CLOCKS.search(slug))
    STORE.mkdir(exist_ok=True)
    names = {}
    for style, package in STYLES.items():
        icons = json.loads((packages / "@iconify-json" / package / "icons.json").read_text())
        names[style] = {slug: labels[slug] for slug in wanted if slug in icons["icons"]}
        drawn = [render(icons, slug) for slug in names[style]]
        drawn += [np.zeros_like(drawn[0])] * (-len(drawn) % COLUMNS)
        grid = np.stack(drawn).reshape(-1, COLUMNS, SIDE, SIDE, 4).swapaxes(1, 2).reshape(-1, COLUMNS * SIDE, 4)
        Image.fromarray(grid).save(STORE / f"{style}.webp", lossless=True, quality=100, method=6)
        print(f"{style}: {len(names[style])} drawings, {(STORE / f'{style}.webp').stat().st_size:,} bytes")
    (STORE / "names.json").write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(HERE.parents[1] / "runs/make_default/npm/node_modules")
