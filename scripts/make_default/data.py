"""The drawings: render the icon sets once, then compose captioned 64 px pictures on the fly.

`python scripts/make_default/data.py` renders every drawing of animals, food, places, activities and
objects at 128 px with alpha into `runs/make_default/icons.npz`. Everything else here is imported by
the training scripts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "make_default"
MODEL = ROOT / "diffusion_kit" / "models" / "default"
SIZE = 64
RENDER = 128

SETS = {"noto": "noto", "3d": "fluent-emoji", "flat": "fluent-emoji-flat"}
GROUPS = {3, 4, 5, 6, 7}  # animals, food, places, activities, objects: no people, symbols, flags
EXTRA = {"red-heart", "ghost", "robot", "alien", "skull"}

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


@dataclass(frozen=True)
class Icons:
    """Every rendered drawing. `pixels` is (n, 128, 128, 4) uint8 with straight alpha."""

    pixels: np.ndarray
    slugs: list[str]
    styles: list[str]
    words: list[str | None]  # the caption's word, None for a drawing only the autoencoder sees
    colours: list[str | None]  # the colour word of a drawing of one hue

    def captioned(self) -> list[int]:
        return [i for i, word in enumerate(self.words) if word is not None]


def concepts(starred: bool = False) -> dict[str, str]:
    """Slug to caption word, from `concepts.txt`; only the starred lines, if asked for."""
    lines = (Path(__file__).parent / "concepts.txt").read_text().splitlines()
    lines = [x for x in lines if x.startswith("*") or not (starred or x.startswith("#"))]
    pairs = (line.lstrip("* ").partition(":") for line in lines)
    return {slug.strip(): (word or slug.replace("-", " ")).strip() for slug, _, word in pairs}


def slugs_to_render(emojis: list[dict]) -> list[str]:
    """The slugs of the groups that are used, as the icon sets spell them."""
    labels = [entry["label"] for entry in emojis if entry.get("group") in GROUPS]
    slugs = [re.sub(r"[^a-z0-9]+", "-", x.lower().replace("’", "")).strip("-") for x in labels]
    clocks = re.compile(r"(o-?clock|-thirty)$")
    return sorted({slug for slug in slugs if not clocks.search(slug)} | EXTRA)


def render(packages: Path) -> None:
    """Render all sets from an npm `node_modules` folder into `icons.npz`."""
    from io import BytesIO

    import resvg_py
    from PIL import Image

    emojis = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text())
    wanted, rows, names, styles = slugs_to_render(emojis), [], [], []
    for style, folder in SETS.items():
        icons = json.loads((packages / "@iconify-json" / folder / "icons.json").read_text())
        width, height = icons.get("width", 16), icons.get("height", 16)
        for slug in wanted:
            if slug not in icons["icons"]:
                continue
            icon = icons["icons"][slug]
            w, h = icon.get("width", width), icon.get("height", height)
            side = max(w, h)
            box = f"{(w - side) / 2} {(h - side) / 2} {side} {side}"
            spaces = 'xmlns="http://www.w3.org/2000/svg" '
            spaces += 'xmlns:xlink="http://www.w3.org/1999/xlink"'
            svg = f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'
            png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER)
            picture = np.asarray(Image.open(BytesIO(bytes(png))).convert("RGBA"))
            rows.append(picture), names.append(slug), styles.append(style)
        print(style, len(rows), flush=True)
    np.savez(WORK / "icons.npz", pixels=np.stack(rows), slugs=names, styles=styles)


def hue_of(pixels: np.ndarray) -> str | None:
    """The colour word of a drawing in which one hue covers most of the area, else None."""
    hsv = cv2.cvtColor(pixels[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    inside = pixels[..., 3] > 200
    vivid = inside & (hsv[..., 1] > 0.35) & (hsv[..., 2] > 0.3)
    if vivid.sum() < 0.55 * inside.sum():
        return None
    angle = np.deg2rad(hsv[..., 0][vivid])
    mean = np.exp(1j * angle).mean()
    if abs(mean) < 0.9:
        return None
    colour = np.median(pixels[..., :3][vivid], axis=0)
    gaps = {name: np.abs(colour - np.array(COLOURS[name])).sum() for name in (*PAINTS, "brown")}
    return min(gaps, key=lambda name: gaps[name])


def load() -> Icons:
    """The rendered drawings with their words and colours."""
    stored = np.load(WORK / "icons.npz")
    pixels, slugs, styles = stored["pixels"], stored["slugs"].tolist(), stored["styles"].tolist()
    words = concepts()
    return Icons(
        pixels,
        slugs,
        styles,
        [words.get(s) for s in slugs],
        [hue_of(picture) for picture in pixels],
    )


def held_out(icons: Icons) -> list[int]:
    """Drawings that no training script sees: every twelfth concept without a caption word."""
    free = sorted({s for s, word in zip(icons.slugs, icons.words, strict=True) if word is None})
    chosen = set(free[::12])
    return [i for i, slug in enumerate(icons.slugs) if slug in chosen]


def paint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Turn a one-hued drawing to another colour: (h, w, 4) uint8 to the same."""
    rgb = pixels[..., :3].astype(np.float32) / 255
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    vivid = (pixels[..., 3] > 100) & (hsv[..., 1] > 0.25)
    if not vivid.any():
        return pixels
    goal = np.array(COLOURS[colour], dtype=np.float32)[None, None] / 255
    h, s, v = cv2.cvtColor(goal, cv2.COLOR_RGB2HSV)[0, 0]
    mean = np.rad2deg(np.angle(np.exp(1j * np.deg2rad(hsv[..., 0][vivid])).mean()))
    weight = np.clip(hsv[..., 1] / 0.25, 0, 1)  # greys keep their colour
    hsv[..., 0] = (hsv[..., 0] + h - mean) % 360
    gain = np.clip(s / np.median(hsv[..., 1][vivid]), 0.3, 2.0)
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + weight * (gain - 1)), 0, 1)
    gain = np.clip(v / np.median(hsv[..., 2][vivid]), 0.6, 2.0)
    hsv[..., 2] = np.clip(hsv[..., 2] * (1 + weight * (gain - 1)), 0, 1)
    turned = np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255, 0, 255).astype(np.uint8)
    return np.concatenate([turned, pixels[..., 3:]], axis=-1)


def place(canvas: np.ndarray, pixels: np.ndarray, size: int, left: int, top: int) -> None:
    """Lay a drawing on a (64, 64, 3) float canvas in [0, 1], in place, without halos."""
    rgba = pixels.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    small = cv2.resize(rgba, (size, size), interpolation=cv2.INTER_AREA)
    y0, y1, x0, x1 = max(top, 0), min(top + size, SIZE), max(left, 0), min(left + size, SIZE)
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = part[..., :3] + canvas[y0:y1, x0:x1] * (1 - part[..., 3:])


def blank(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A (64, 64, 3) canvas of a named colour, very slightly varied."""
    base = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-5, 5, 3).astype(np.float32)
    return np.broadcast_to(np.clip(base, 0, 255) / 255, (SIZE, SIZE, 3)).copy()


@dataclass(frozen=True)
class Sample:
    """A composed picture, (64, 64, 3) uint8, and what is on it."""

    picture: np.ndarray
    index: int
    background: str
    colour: str | None  # the object's colour word, where it has one
    painted: bool


def compose(icons: Icons, index: int, rng: np.random.Generator, flip: float = 0.2, moved: bool = True) -> Sample:
    """One drawing on one named background, perhaps repainted, and a little shifted and scaled."""
    pixels, colour, painted = icons.pixels[index], icons.colours[index], False
    if colour is not None and rng.random() < 0.5:
        colour, painted = str(rng.choice(PAINTS)), True
        pixels = paint(pixels, colour)
    if moved and rng.random() < flip:
        pixels = pixels[:, ::-1]
    background = str(rng.choice(list(COLOURS))) if rng.random() < 0.75 else "white"
    while background == colour:
        background = str(rng.choice(list(COLOURS)))
    canvas = blank(background, rng)
    size = int(rng.integers(48, 61)) if moved else 54
    left, top = (SIZE - size) // 2 + (rng.integers(-3, 4, 2) if moved else np.zeros(2))
    place(canvas, pixels, size, int(left), int(top))
    return Sample((canvas * 255 + 0.5).astype(np.uint8), index, background, colour, painted)


def caption(icons: Icons, sample: Sample, rng: np.random.Generator) -> str:
    """A caption as the set writes it, or as people do."""
    word, style = icons.words[sample.index] or "thing", icons.styles[sample.index]
    if sample.painted or (sample.colour and rng.random() < 0.4):
        word = f"{sample.colour} {word}"
    place_words = [f" on a {sample.background} background", f" on {sample.background}"]
    tail = place_words[0] if rng.random() < 0.8 else place_words[1]
    if sample.background == "white" and rng.random() < 0.5:
        tail = ""
    article = "an" if word[0] in "aeiou" else "a"
    # A prompt without a style word should have one meaning, so it mostly means the 3d drawings.
    if rng.random() < (0.25 if style == "3d" else 0.85):
        heads = [f"{style} emoji of {word}", f"{style} drawing of {article} {word}"]
        heads += [f"{article} {word}, {style} style"]
        head = heads[int(rng.integers(3))]
        return f"{article} {word}{tail}, {style} style" if head.endswith("style") else head + tail
    heads = [f"{article} {word}", f"{article} {word}", word, f"a drawing of {article} {word}"]
    return heads[int(rng.integers(4))] + tail


def scene(icons: Icons, pool: list[int], rng: np.random.Generator) -> np.ndarray:
    """For the autoencoder: gradients or noise behind 1 to 3 drawings of any size."""
    cells = int(rng.integers(1, 9))
    low = rng.random((cells, cells, 3)).astype(np.float32) * rng.random() + rng.random(3)
    low = low.astype(np.float32) / low.max()
    canvas = np.clip(cv2.resize(low, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC), 0, 1)
    for _ in range(int(rng.integers(1, 4))):
        size = int(rng.integers(28, 80))
        left, top = rng.integers(-size // 3, SIZE - size // 2, 2)
        pixels = icons.pixels[pool[int(rng.integers(len(pool)))]]
        place(canvas, pixels[:, :: int(rng.choice([-1, 1]))], size, int(left), int(top))
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    render(WORK / "npm" / "node_modules")
