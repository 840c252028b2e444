"""Figures of the exported model: dB, background colours, edge F1. `python measure.py`"""

from __future__ import annotations

import sys

import adapter
import autoencoder
import data
import numpy as np
import sheet
import torch
from diffusers import StableDiffusionXLAdapterPipeline, StableDiffusionXLPipeline
from PIL import Image
from scipy.ndimage import binary_dilation


def border_colour(picture: np.ndarray) -> str:
    """The named colour nearest to the mean of the outermost 3 pixels of (64, 64, 3) uint8."""
    frame = np.ones(picture.shape[:2], dtype=bool)
    frame[3:-3, 3:-3] = False
    mean = picture[frame].mean(0)
    return min(data.COLOURS, key=lambda c: float(np.abs(mean - np.array(data.COLOURS[c])).sum()))


def inside_colour(picture: np.ndarray) -> str:
    """The paint nearest to the median of the vivid middle of (64, 64, 3) uint8."""
    middle = picture[16:48, 16:48].reshape(-1, 3).astype(int)
    vivid = middle[np.ptp(middle, axis=1) > 80]
    colour = np.median(vivid if len(vivid) else middle, axis=0)
    return min(data.PAINTS, key=lambda c: float(np.abs(colour - np.array(data.COLOURS[c])).sum()))


def edge_f1(made: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two (64, 64) edge maps with a tolerance of one pixel."""
    a, b = made > 0, wanted > 0
    box = np.ones((3, 3), dtype=bool)
    precision = (a & binary_dilation(b, box)).sum() / max(a.sum(), 1)
    recall = (b & binary_dilation(a, box)).sum() / max(b.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def colours(pipe: StableDiffusionXLPipeline, count: int) -> None:
    words, rng = sorted(set(data.concepts().values())), np.random.default_rng(3)
    asked = [str(rng.choice(list(data.COLOURS))) for _ in range(count)]
    prompts = [f"a {rng.choice(words)} on a {c} background" for c in asked]
    got = [border_colour(np.asarray(x)) for x in sheet.draw(pipe, prompts)]
    right = sum(a == b for a, b in zip(asked, got, strict=True))
    print(f"background colour right: {right} of {count}")
    fruits = ("apple", "balloon", "car", "chair", "fish", "dress", "key", "tulip")
    pairs = [(fruit, paint) for fruit in fruits for paint in data.PAINTS]
    got = [inside_colour(np.asarray(x)) for x in sheet.draw(pipe, [f"a {p} {f}" for f, p in pairs])]
    right = sum(paint == b for (_, paint), b in zip(pairs, got, strict=True))
    print(f"object colour right: {right} of {len(pairs)}")


def edges(pipe: StableDiffusionXLPipeline, steered: StableDiffusionXLAdapterPipeline, count: int) -> None:
    """Edge F1 without, with, against wrong edges: known drawings, then new ones unprompted."""
    icons, rng = data.load(), np.random.default_rng(4)
    for title, pool in (("captioned", icons.captioned()), ("held out", data.held_out(icons))):
        samples = [data.compose(icons, int(i), rng, flip=0.5) for i in rng.choice(pool, count)]
        words = [icons.words[sample.index] for sample in samples]
        pairs = zip(words, samples, strict=True)
        prompts = [f"a {w} on a {x.background} background" if w else "" for w, x in pairs]
        wanted = [adapter.canny(s.picture) for s in samples]
        plain, led = sheet.draw(pipe, prompts), sheet.draw(steered, prompts, wanted)

        def f1(made: list[Image.Image], lines: list[np.ndarray]) -> float:
            pairs = zip(made, lines, strict=True)
            return float(np.mean([edge_f1(adapter.canny(np.asarray(x)), y) for x, y in pairs]))

        wrong = f1(led, wanted[1:] + wanted[:1])
        print(f"{title}: edge F1 without {f1(plain, wanted):.3f}, with {f1(led, wanted):.3f}")
        print(f"{title}: with, against wrong edges {wrong:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    pipe = sheet.load()
    dB = autoencoder.decibels(pipe.vae, autoencoder.held_out_pictures())
    print(f"autoencoder, held out: {dB:.2f} dB")
    colours(pipe, 64)
    if (data.MODEL / "controls" / "canny").exists():
        edges(pipe, sheet.load_canny(sheet.load()), 32)
