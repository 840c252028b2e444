"""Crops of the photos that come with scikit-image: 200 to train on, 16 of two other photos to evaluate on.

python examples/photo_crops.py photos

photos/train/ and photos/held_out/ have pictures of 64 x 64 pixels and a metadata.jsonl with a caption for each. Every run
writes the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

TRAIN = {
    "astronaut.png": "a woman in an orange space suit",
    "brick.png": "a brick wall",
    "coffee.png": "a cup of coffee on a table",
    "coins.png": "old coins",
    "motorcycle_left.png": "a motorcycle in a garage",
    "page.png": "a printed page",
    "retina.jpg": "the inside of an eye",
    "rocket.jpg": "a rocket",
}
HELD_OUT = {"chelsea.png": "a cat", "camera.png": "a man with a camera"}
SIDE = 64  # of the pictures, in pixels
SCALES = 0.15, 0.5  # smallest and largest side of a crop, as a share of the photo's shorter side


def crop(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of a photo at a random place and scale."""
    side = round(min(photo.size) * rng.uniform(*SCALES))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    return photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))


def write(folder: Path, photos: dict[str, str], count: int, rng: np.random.Generator) -> None:
    """So many crops of several photos, as many of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, caption in photos.items():
        photo = Image.open(Path(skimage.data_dir) / name).convert("RGB")
        for k in range(count // len(photos)):
            file = f"{Path(name).stem}-{k:02d}.png"
            crop(photo, rng).save(folder / file)
            rows.append({"image": file, "caption": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    write(folder / "train", TRAIN, 200, rng)
    write(folder / "held_out", HELD_OUT, 16, rng)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "photos"))
