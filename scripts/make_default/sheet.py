"""Contact sheets of the exported model, with plain diffusers. `python sheet.py captions canny`"""

from __future__ import annotations

import argparse
from pathlib import Path

import adapter
import data
import numpy as np
import torch
from data import MODEL, ROOT
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline, T2IAdapter
from PIL import Image, ImageDraw
from skimage import data as photos

STEPS, GUIDANCE, BATCH, ZOOM, LINE = 20, 4.0, 16, 4, 22
PICTURES = ROOT / "docs" / "pictures"

PROMPTS = (
    "a red apple on a white background",
    "a green apple on a blue background",
    "a blue apple on a yellow background",
    "a purple apple",
    "noto emoji of apple on a green background",
    "flat drawing of an apple on teal",
    "a cat on a blue background",
    "a pink cat on a white background",
    "noto emoji of cat on a purple background",
    "flat emoji of cat on a red background",
    "a penguin on a teal background",
    "a fox on a green background",
    "a red car on a white background",
    "a blue car on a pink background",
    "flat emoji of bus on grey",
    "a rocket on a black background",
    "a sailboat on a blue background",
    "a hamburger",
    "a tree on a pink background",
    "a sunflower on a blue background",
    "a cactus on orange",
    "noto emoji of guitar on a yellow background",
    "a purple balloon on a white background",
    "a key on a red background",
)

# What the adapter is shown: held-out drawings and photographs, with the word to draw.
DRAWINGS = {
    "cat": "cat",
    "dodo": "duck",
    "trolleybus": "bus",
    "stopwatch": "watch",
    "lime": "lemon",
}
PHOTOS = {"coffee": (0, 110, 400), "chelsea": (0, 70, 300)}  # top, left, side of the crop


def load() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(
        MODEL, torch_dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_canny(pipe: StableDiffusionXLPipeline) -> StableDiffusionXLAdapterPipeline:
    net = T2IAdapter.from_pretrained(MODEL / "controls" / "canny", local_files_only=True)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    parts.pop("feature_extractor", None)
    new = StableDiffusionXLAdapterPipeline(**parts, adapter=net.float())
    new.set_progress_bar_config(disable=True)
    return new


def draw(
    pipe: StableDiffusionXLPipeline | StableDiffusionXLAdapterPipeline,
    prompts: list[str],
    edges: list[np.ndarray] | None = None,
    **call: object,
) -> list[Image.Image]:
    """One picture for each prompt, picture k from seed k, guided by its edges (64, 64) if given."""
    made: list[Image.Image] = []
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE} | call
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        control: dict[str, object] = {}
        if edges is not None:
            shown = edges[start : start + BATCH]
            control = {"image": [Image.fromarray(lines).convert("RGB") for lines in shown]}
        seeds = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        out = pipe(part, height=64, width=64, generator=seeds, **control, **settings)
        made += out.images
    return made


def photo(name: str) -> np.ndarray:
    top, left, side = PHOTOS[name]
    crop = getattr(photos, name)()[top : top + side, left : left + side]
    return np.asarray(Image.fromarray(crop).resize((64, 64), Image.Resampling.BOX))


def grid(tiles: list[tuple[Image.Image, str]], columns: int, path: Path) -> None:
    """Tiles with their words underneath, enlarged without smoothing, with at most 256 colours."""
    side = data.SIZE * ZOOM
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + LINE + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (tile, words) in enumerate(tiles):
        x, y = k % columns * (side + 8) + 4, k // columns * (side + LINE + 8) + 4
        sheet.paste(tile.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x + 2, y + side + 4), words, fill="black", font_size=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = sheet.quantize(256, dither=Image.Dither.NONE)
    flat.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def captions(path: Path) -> None:
    prompts = list(PROMPTS)
    grid(list(zip(draw(load(), prompts), prompts, strict=True)), 6, path)


def canny(path: Path) -> None:
    """Rows of: source, its edges, a prompt without the adapter, two with it, none with it."""
    icons, rng = data.load(), np.random.default_rng(5)
    base = load()
    steered = load_canny(load())
    words = {"coffee": "cup of coffee", "chelsea": "cat"} | DRAWINGS
    sources = {name: photo(name) for name in PHOTOS}
    for i in data.held_out(icons):
        if icons.styles[i] == "3d" and icons.slugs[i] in DRAWINGS:
            sources[icons.slugs[i]] = data.compose(icons, i, rng).picture
    tiles: list[tuple[Image.Image, str]] = []
    for name, picture in sources.items():
        lines = adapter.canny(picture)
        prompts = [f"a {words[name]} on a {c} background" for c in ("blue", "yellow")]
        tiles += [(Image.fromarray(picture), name), (Image.fromarray(lines), "its edges")]
        tiles += [(draw(base, prompts[:1])[0], f"without: {prompts[0]}")]
        drawn = draw(steered, [*prompts, ""], [lines] * 3)
        tiles += list(zip(drawn, [*prompts, "no prompt"], strict=True))
    grid(tiles, 6, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sheets", nargs="+", choices=("captions", "canny"))
    parser.add_argument("--folder", type=Path, default=PICTURES)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.sheets:
        {"captions": captions, "canny": canny}[name](args.folder / f"default-{name}.png")
