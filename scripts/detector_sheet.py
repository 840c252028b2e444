"""Makes docs/pictures/detectors.png: what every detector that needs no weights makes of some photos, and poses where its
networks are here.

python scripts/detector_sheet.py [PHOTO ...]
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion_kit import detect, load_image
from diffusion_kit.adapters.detectors import missing

SHEET = Path(__file__).parents[1] / "docs" / "pictures" / "detectors.png"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")  # test pictures that come with scikit-image: see NOTICE
NAMES = ("canny", "sketch", "lineart", "pose", "greyscale", "blur", "tile", "palette", "regions", "shuffle")
SIDE, CELL, LABEL, GAP = 512, 200, 22, 4  # pixels


def main(files: list[Path]) -> None:
    """Two bands below each other, each with a row for each photo and a column for each of half the detectors."""
    photos = [ImageOps.fit(load_image(file), (SIDE, SIDE), Image.Resampling.LANCZOS) for file in files]
    names = ("photo", *(name for name in NAMES if missing(name) is None))
    columns = (len(names) + 1) // 2
    bands = [band(photos, names[:columns]), band(photos, names[columns:])]
    sheet = Image.new("RGB", (bands[0].width, 2 * bands[0].height), "white")
    for number, picture in enumerate(bands):
        sheet.paste(picture, (0, number * picture.height))
    sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(SHEET, optimize=True)
    print(f"{SHEET}  {sheet.width} x {sheet.height}, {SHEET.stat().st_size / 1e3:.0f} kB")


def band(photos: list[Image.Image], names: tuple[str, ...]) -> Image.Image:
    step = CELL + GAP
    picture = Image.new("RGB", (len(names) * step - GAP, LABEL + len(photos) * step), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for column, name in enumerate(names):
        draw.text((column * step + CELL / 2, LABEL / 2), name, "black", font, "mm")
        for row, photo in enumerate(photos):
            seen = photo if name == "photo" else detect(name, photo)
            if name == "pose" and seen.getbbox() is None:
                continue  # nobody there
            picture.paste(seen.resize((CELL, CELL), Image.Resampling.LANCZOS), (column * step, LABEL + row * step))
    return picture


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of pose, that it found nobody
    if sys.argv[1:]:
        main([Path(argument) for argument in sys.argv[1:]])
    else:
        import skimage

        main([Path(skimage.__file__).parent / "data" / name for name in PHOTOS])
