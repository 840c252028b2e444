"""Captioned pictures composed of the drawings: what the embedded model is trained on.

`python scripts/make_default/pictures.py` writes three folders of 64 px pictures with a `metadata.jsonl` each into
`runs/make_default/data/`: `base` (words of `concepts.txt`, mostly in the middle), `controls` (every drawing but the held
out ones, moved about) and `scenes` (several drawings over gradients and noise, for the autoencoder). `held_out.txt` is in
none of them, and no measured concept on the backgrounds kept from it. The same call writes the same bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import drawings
import numpy as np
from drawings import Drawing
from PIL import Image

DATA = drawings.HERE.parents[1] / "runs/make_default/data"
SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "teal": (20, 160, 160),
    "blue": (40, 90, 220),
    "purple": (130, 50, 180),
    "pink": (250, 150, 200),
    "brown": (120, 70, 30),
}
PAINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
# Pictures of each drawing. A prompt without a style word means the 3d drawings, so these are more.
COMMON, OTHERS, CONTROLS, SCENES = 72, 24, 9, 6000
SHARE = {"3d": 1.5, "noto": 1.0, "flat": 0.5}


@dataclass(frozen=True)
class Picture:
    """`pixels` is (64, 64, 3) uint8; `colour` the object's colour word, where it has one."""

    pixels: np.ndarray
    drawing: Drawing
    background: str
    colour: str | None
    painted: bool


def hue_of(pixels: np.ndarray) -> str | None:
    """The colour word of a drawing in which one hue covers most of the area, else None."""
    hsv = cv2.cvtColor(pixels[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    inside = pixels[..., 3] > 200
    vivid = inside & (hsv[..., 1] > 0.35) & (hsv[..., 2] > 0.3)
    if not vivid.any() or vivid.sum() < 0.55 * inside.sum():
        return None
    if abs(np.exp(1j * np.deg2rad(hsv[..., 0][vivid])).mean()) < 0.9:
        return None
    colour = np.median(pixels[..., :3][vivid], axis=0)
    gaps = {name: np.abs(colour - np.array(COLOURS[name])).sum() for name in (*PAINTS, "brown")}
    return min(gaps, key=lambda name: gaps[name])


def paint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Turns a drawing of one hue, (h, w, 4) uint8, to another colour; greys stay."""
    hsv = cv2.cvtColor(pixels[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    vivid = (pixels[..., 3] > 100) & (hsv[..., 1] > 0.25)
    if not vivid.any():
        return pixels
    goal = np.array(COLOURS[colour], dtype=np.float32)[None, None] / 255
    h, s, v = cv2.cvtColor(goal, cv2.COLOR_RGB2HSV)[0, 0]
    mean = np.rad2deg(np.angle(np.exp(1j * np.deg2rad(hsv[..., 0][vivid])).mean()))
    weight = np.clip(hsv[..., 1] / 0.25, 0, 1)
    hsv[..., 0] = (hsv[..., 0] + h - mean) % 360
    for channel, wanted, least in ((1, s, 0.3), (2, v, 0.6)):
        gain = np.clip(wanted / np.median(hsv[..., channel][vivid]), least, 2.0)
        hsv[..., channel] = np.clip(hsv[..., channel] * (1 + weight * (gain - 1)), 0, 1)
    turned = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255, 0, 255).astype(np.uint8)
    return np.concatenate([turned, pixels[..., 3:]], axis=-1)


def place(canvas: np.ndarray, pixels: np.ndarray, size: int, left: int, top: int) -> None:
    """Lays a drawing on a (64, 64, 3) float canvas in [0, 1], in place, without halos."""
    rgba = pixels.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    small = cv2.resize(rgba, (size, size), interpolation=cv2.INTER_AREA if size < SIZE else cv2.INTER_LINEAR)
    y0, y1, x0, x1 = max(top, 0), min(top + size, SIZE), max(left, 0), min(left + size, SIZE)
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = part[..., :3] + canvas[y0:y1, x0:x1] * (1 - part[..., 3:])


def compose(drawing: Drawing, rng: np.random.Generator, *, moved: bool, kept: tuple[str, ...] = ()) -> Picture:
    """One drawing on a named background that is not among `kept`, perhaps repainted, shifted, scaled and turned round."""
    pixels, colour, painted = drawing.pixels, hue_of(drawing.pixels), False
    if colour is not None and rng.random() < 0.4:
        colour, painted = str(rng.choice(PAINTS)), True
        pixels = paint(pixels, colour)
    if moved and rng.random() < 0.2:
        pixels = pixels[:, ::-1]
    background = str(rng.choice([name for name in COLOURS if name not in (*kept, colour)]))
    base = np.array(COLOURS[background], dtype=np.float32) + rng.uniform(-5, 5, 3).astype(np.float32)
    canvas = np.broadcast_to(np.clip(base, 0, 255) / 255, (SIZE, SIZE, 3)).astype(np.float32)
    size = int(rng.integers(46, 61)) if moved else 54
    left, top = (SIZE - size) // 2 + (rng.integers(-4, 5, 2) if moved else np.zeros(2))
    place(canvas, pixels, size, int(left), int(top))
    return Picture((canvas * 255 + 0.5).astype(np.uint8), drawing, background, colour, painted)


def captions(picture: Picture, rng: np.random.Generator, count: int = 4) -> list[str]:
    """Several captions, as the set writes them or as people do."""
    return [_caption(picture, rng) for _ in range(count)]


def _caption(picture: Picture, rng: np.random.Generator) -> str:
    drawing = picture.drawing
    word = drawings.words().get(drawing.slug, drawing.label.lower())
    if picture.painted or (picture.colour and rng.random() < 0.4):
        word = f"{picture.colour} {word}"
    article = "an" if word[0] in "aeiou" else "a"
    tail = f" on a {picture.background} background" if rng.random() < 0.8 else f" on {picture.background}"
    if picture.background == "white" and rng.random() < 0.5:
        tail = ""
    if rng.random() < (0.25 if drawing.style == "3d" else 0.9):
        named = (f"{drawing.style} emoji of {word}{tail}", f"{drawing.style} drawing of {article} {word}{tail}")
        return str(rng.choice([*named, named[0], f"{article} {word}{tail}, {drawing.style} style"]))
    return str(rng.choice([f"{article} {word}", f"{article} {word}", word, f"a drawing of {article} {word}"])) + tail


def scene(pool: list[Drawing], rng: np.random.Generator) -> np.ndarray:
    """Gradients or noise behind 1 to 3 drawings of any size, (64, 64, 3) uint8."""
    cells = int(rng.integers(1, 9))
    low = rng.random((cells, cells, 3)) * rng.random() + rng.random(3)
    ground = cv2.resize((low / low.max()).astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    canvas = np.clip(ground, 0, 1)
    for _ in range(int(rng.integers(1, 4))):
        size = int(rng.integers(28, 80))
        left, top = rng.integers(-size // 3, SIZE - size // 2, 2)
        place(canvas, pool[int(rng.integers(len(pool)))].pixels[:, :: int(rng.choice([-1, 1]))], size, left, top)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def rng_of(*key: object) -> np.random.Generator:
    """A generator of its own for each picture, so that one more picture changes no other."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, key)).encode()))


def base_pictures(pool: list[Drawing]) -> Iterator[tuple[str, Picture]]:
    words, common, measured = drawings.words(), drawings.common(), drawings.measured()
    for drawing in pool:
        if drawing.slug not in words:
            continue
        count = round((COMMON if drawing.slug in common else OTHERS) * SHARE[drawing.style])
        for k in range(count):
            name = f"{drawing.style}-{drawing.slug}-{k}"
            yield name, compose(drawing, rng_of(name), moved=k % 3 == 0, kept=measured.get(drawing.slug, ()))


def control_pictures(pool: list[Drawing]) -> Iterator[tuple[str, Picture]]:
    words = drawings.words()
    kept = {words[slug]: backgrounds for slug, backgrounds in drawings.measured().items()}
    for drawing in pool:
        word = words.get(drawing.slug, drawing.label.lower())  # two drawings may have the same
        for k in range(CONTROLS):
            name = f"{drawing.style}-{drawing.slug}-{k}"
            yield name, compose(drawing, rng_of("controls", name), moved=k % 3 > 0, kept=kept.get(word, ()))


def write(folder: Path, pictures: Iterator[tuple[str, np.ndarray, list[str]]]) -> None:
    """PNG files and, behind them, the list that names them: a folder with a list is whole."""
    if (folder / "metadata.jsonl").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, pixels, texts in pictures:
        file = f"images/{name}.png"
        Image.fromarray(pixels).save(folder / file)
        rows.append(json.dumps({"image": file, "text": texts, "width": SIZE, "height": SIZE}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{folder}: {len(rows)} pictures", flush=True)


def main() -> None:
    cv2.setNumThreads(0)
    left_out = drawings.held_out()
    pool = [drawing for drawing in drawings.load() if drawing.slug not in left_out]

    def captioned(pictures: Iterator[tuple[str, Picture]]) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        return ((name, own.pixels, captions(own, rng_of("captions", name))) for name, own in pictures)

    write(DATA / "scenes", ((f"{k}", scene(pool, rng_of("scene", k)), [""]) for k in range(SCENES)))
    write(DATA / "controls", captioned(control_pictures(pool)))
    write(DATA / "base", captioned(base_pictures(pool)))


if __name__ == "__main__":
    main()
