"""Contact sheets of the embedded model for the documentation: `python scripts/make_default/sheets.py captions nearest ...`

Every picture is the first one made: prompts were chosen, seeds were not.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import conditions
import doodles
import drawings
import numpy as np
import pictures
from measure import DRAWN, IMAGE_GUIDANCE, Model, condition_of, draw, neighbours, samples, seen
from PIL import Image, ImageDraw, ImageFont

from diffusion_kit.models.sources import embedded

ZOOM, GAP, LETTERS, LINE = 3, 6, 31, 14  # letters and height of a line of words below a tile
SIDE = ZOOM * pictures.SIZE
KEPT_BACK = ("moon", "motorcycle")  # photos that nobody has said may be shown
Tile = tuple[np.ndarray, str]


def grid(tiles: Sequence[Tile], columns: int, path: Path) -> None:
    """Pictures (64, 64, 3) with their words below, enlarged without smoothing."""
    words = [textwrap.wrap(text, LETTERS) for _, text in tiles]
    step, height = SIDE + GAP, SIDE + GAP + LINE * max(map(len, words))
    sheet = Image.new("RGB", (columns * step + GAP, -(-len(tiles) // columns) * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, ((tile, _), lines) in enumerate(zip(tiles, words, strict=True)):
        x, y = k % columns * step + GAP, k // columns * height + GAP
        sheet.paste(Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + SIDE), "\n".join(lines), "black", font, spacing=0)
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def captions(model: Model) -> tuple[list[Tile], int]:
    prompts = (drawings.HERE / "prompts.txt").read_text().splitlines()
    return list(zip(draw(model.pipe, prompts, [0] * len(prompts)), prompts, strict=True)), 8


def controls(model: Model) -> tuple[list[Tile], int]:
    """Rows of photos, what the prompt alone makes, and for each control its conditions and what it makes of them."""
    asked = conditions.held_out()[:56:7]  # of all styles and eight backgrounds
    prompts, seeds = [own.prompt for own in asked], [0] * len(asked)
    tiles = [(own.pixels, own.slug.replace("-", " ")) for own in asked]
    tiles += zip(draw(model.pipe, prompts, seeds), prompts, strict=True)
    shown: list[str] = []  # detectors, each of whose conditions is shown once
    for name in model.controls:
        found, detector = [seen(name, own.pixels) for own in asked], condition_of(name)[0]
        tiles += [(np.asarray(own), detector) for own in found if detector not in shown]
        shown.append(detector)
        for guidance, said in arms(model, name):
            tiles += [(own, said) for own in draw(model.pipe, prompts, seeds, name, found, guidance)]
    return tiles, len(asked)


def arms(model: Model, control: str) -> list[tuple[float | None, str]]:
    """A control plain and, for edges, with guidance over its image; and the words below."""
    plain, guided = (None, f"with {control}"), (IMAGE_GUIDANCE, f"with {control}, guidance {IMAGE_GUIDANCE:g}")
    return [plain, guided] if model.guides(control) else [plain]


def lines(model: Model, rows: Sequence[tuple[str, str, Image.Image]], photos: bool) -> tuple[list[Tile], int]:
    """Two rows side by side, in each the picture, what the prompt alone makes, and what controls make of the picture."""
    prompts, seeds = [prompt for _, prompt, _ in rows], [0] * len(rows)
    shown = [np.asarray(own.resize((pictures.SIZE, pictures.SIZE), Image.Resampling.LANCZOS)) for _, _, own in rows]
    parts = [[(own, name) for own, (name, _, _) in zip(shown, rows, strict=True)]]
    parts.append(list(zip(draw(model.pipe, prompts, seeds), prompts, strict=True)))
    detectors: list[str] = []
    for control in (name for name in model.controls if name in DRAWN):
        found = [seen(control, own) for own in shown] if photos else [own for _, _, own in rows]
        detector = condition_of(control)[0]
        if photos and detector not in detectors:
            parts.append([(np.asarray(own), detector) for own in found])
        detectors.append(detector)
        guidance, said = arms(model, control)[-1]
        parts.append([(own, said) for own in draw(model.pipe, prompts, seeds, control, found, guidance)])
    return [tile for row in zip(*parts, strict=True) for tile in row], 2 * len(parts)


def nearest(model: Model) -> tuple[list[Tile], int]:
    """Generated pictures of the measured concepts, and the nearest training picture right of each.

    Of pairs of concept and background that were trained, where something learned by heart would show.
    """
    chosen, asked = samples(new=False), conditions.measured()
    made = np.load(model.file("captions", "npy"))[chosen]
    tiles: list[Tile] = []
    for k, picture, file, distance in zip(chosen, made, *neighbours(made), strict=True):
        tiles += [(picture, asked[k].prompt), (np.asarray(Image.open(file)), f"{file.stem} at {distance:.3f}")]
    return tiles, 8


SHEETS = {
    "captions": captions,
    "controls": controls,
    "doodles": lambda model: lines(model, doodles.doodles(), photos=False),
    "photos": lambda model: lines(model, [row for row in doodles.photos() if row[0] not in KEPT_BACK], photos=True),
    "nearest": nearest,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheets", nargs="+", choices=SHEETS)
    parser.add_argument("--model", type=Path, default=embedded(), help="folder; by default the embedded model")
    parser.add_argument("--folder", type=Path, default=drawings.HERE.parents[1] / "docs/pictures")
    options = parser.parse_args()
    for name in options.sheets:
        own = options.model.name.replace("_", "-")
        grid(*SHEETS[name](Model(options.model)), options.folder / f"{own}-{name}.png")
