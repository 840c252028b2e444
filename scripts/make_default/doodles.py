"""Twenty doodles as people draw them, and crops of ten photographs: what the edge controls are shown beyond drawings.

A doodle is a few strokes, white on black, whose hand shakes, whose lines do not close and are 1 to 4 px wide. The
photographs come with scikit-image (see NOTICE).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pictures
import skimage
from pictures import SIZE
from PIL import Image, ImageDraw

LIST = Path(__file__).with_name("doodles.txt")
WIDTHS = (2, 1, 3, 4)  # px, by turns
WOBBLE, GAP = 0.7, 5  # px
STEP = 0.5  # px between the points of a stroke

GROUNDS = ("blue", "yellow", "white", "green", "pink")

# File, left, top and side of the square, and the caption.
PHOTOS: dict[str, tuple[str, int, int, int, str]] = {
    "cat": ("chelsea.png", 90, 0, 300, "a cat"),
    "coffee": ("coffee.png", 90, 0, 400, "a cup of coffee"),
    "clock": ("clock_motion.png", 50, 0, 300, "a clock"),
    "rocket": ("rocket.jpg", 220, 60, 220, "a rocket on a blue background"),
    "camera": ("camera.png", 150, 50, 250, "a camera on a white background"),
    "astronaut": ("astronaut.png", 110, 0, 230, "an astronaut"),
    "moon": ("moon.png", 0, 0, 512, "a grey moon"),
    "coin": ("coins.png", 26, 18, 66, "a coin on a black background"),
    "motorcycle": ("motorcycle_left.png", 150, 60, 400, "a motorcycle"),
    "retina": ("retina.jpg", 0, 0, 1411, "an orange moon on a black background"),
}


def stroke(kind: str, points: np.ndarray) -> np.ndarray:
    """Points (n, 2), at most STEP apart, of a stroke through some (m, 2)."""
    if kind == "oval":
        (x, y), radii = points
        angles = np.linspace(0, 2 * np.pi, 200) - np.pi / 2
        return np.stack([x + radii[0] * np.cos(angles), y + radii[1] * np.sin(angles)], 1)
    if kind == "curve":  # Catmull and Rom (1974)
        before, after = 2 * points[0] - points[1], 2 * points[-1] - points[-2]
        p, t = np.stack([before, *points, after]), np.linspace(0, 1, 40)[:, None]
        parts = [
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
            for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
        ]
        return np.concatenate(parts)
    ends = zip(points, points[1:], strict=False)
    return np.concatenate([np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / STEP))) for a, b in ends])


def shaken(line: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The stroke as a hand draws it: slow waves, an end that misses its start, and perhaps a gap."""
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    waves = [np.sin(length[:, None] / rng.uniform(3, 12) + rng.uniform(0, 6.3, 2)) for _ in range(3)]
    line = line + WOBBLE * sum(waves) / np.sqrt(3) + rng.normal(0, 0.5, 2)
    if length[-1] < 6 * GAP or rng.random() < 0.4:
        return [line]
    start = rng.uniform(GAP, length[-1] - 2 * GAP)
    return [line[length < start], line[length > start + GAP * rng.uniform(0.6, 1.2)]]


def doodle(word: str, strokes: str, width: int) -> Image.Image:
    """White on black, RGB, 64 px; the same each time."""
    rng, picture = pictures.rng_of("doodle", word), Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(picture)
    for text in strokes.split(";"):
        kind, *numbers = text.split()
        points = np.array([[float(x) for x in pair.split(",")] for pair in numbers])
        for line in shaken(stroke(kind, points), rng):
            pen.line([tuple(point) for point in line.tolist()], fill=255, width=width, joint="curve")
    return picture.convert("RGB")


def doodles() -> list[tuple[str, str, Image.Image]]:
    """Names, prompts and doodles, of `doodles.txt`."""
    lines = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    rows = []
    for number, (word, _, strokes) in enumerate(line.partition(": ") for line in lines):
        article = "an" if word[0] in "aeiou" else "a"
        prompt = f"{article} {word} on a {GROUNDS[number % len(GROUNDS)]} background"
        rows.append((word.replace(" ", "-"), prompt, doodle(word, strokes, WIDTHS[number % len(WIDTHS)])))
    return rows


def photos() -> list[tuple[str, str, Image.Image]]:
    """Names, prompts and square crops."""
    folder = Path(skimage.__file__).parent / "data"
    return [
        (name, prompt, Image.open(folder / file).convert("RGB").crop((left, top, left + side, top + side)))
        for name, (file, left, top, side, prompt) in PHOTOS.items()
    ]
