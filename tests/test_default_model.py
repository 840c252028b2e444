"""The embedded model: it is there, it follows captions, and its control follows edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import seeds
from PIL import Image, ImageDraw

from diffusion_kit import AutoPipelineForText2Image, Control, detect
from diffusion_kit.cli import main
from diffusion_kit.models.sources import embedded
from diffusion_kit.models.vae import encode_picture

COLOURS = {"red": (220, 40, 40), "green": (50, 160, 60), "blue": (40, 80, 220), "yellow": (250, 210, 50)}
EXAMPLE = Path(__file__).parents[1] / "examples" / "horse.png"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained("default")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any, prompts: list[str], **more: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    call = {"num_inference_steps": 12, "guidance_scale": 4.0, "generator": generators}
    return [np.asarray(image) for image in pipe(prompts, **{**call, **more}).images]


def test_files() -> None:
    files = [file for file in embedded().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 60e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert (embedded() / "controls" / "canny" / "config.json").is_file()


def test_it_is_loaded_in_float32(pipe: Any) -> None:
    """Its files are in half precision, in which a CPU is slow."""
    nets = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {weight.dtype for net in (*nets, pipe.load_control("canny")) for weight in net.parameters()} == {
        torch.float32
    }


def test_backgrounds_have_the_colour_of_the_caption(pipe: Any) -> None:
    prompts = [f"3d emoji of {thing} on a {colour} background" for colour in COLOURS for thing in ("apple", "house")]
    right = 0
    for prompt, image in zip(prompts, make(pipe, prompts), strict=True):
        border = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3), image[:, :3].reshape(-1, 3)])
        mean = np.median(border, 0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
        right += nearest in prompt
    assert right >= 7, f"{right} of 8 backgrounds"


def shapes() -> list[Image.Image]:
    """A disc, a square, a triangle and a star on a plain ground."""
    pictures = []
    star = [(32 + r * np.sin(k * np.pi / 5), 32 - r * np.cos(k * np.pi / 5)) for k, r in enumerate([26, 11] * 5)]
    for draw_it in (
        lambda d: d.ellipse((10, 10, 54, 54), fill="red"),
        lambda d: d.rectangle((12, 12, 52, 52), fill="red"),
        lambda d: d.polygon([(32, 8), (8, 54), (56, 54)], fill="red"),
        lambda d: d.polygon(star, fill="red"),
    ):
        picture = Image.new("RGB", (64, 64), "white")
        draw_it(ImageDraw.Draw(picture))
        pictures.append(picture)
    return pictures


def edge_f1(made: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of two edge maps (H, W) of 0 and 255; an edge counts as found within one pixel."""
    near = np.ones((3, 3), np.uint8)
    precision = (cv2.dilate(wanted, near)[made > 0] > 0).mean() if made.any() else 0.0
    recall = (cv2.dilate(made, near)[wanted > 0] > 0).mean()
    return 2 * precision * recall / (precision + recall + 1e-9)


def test_outlines_follow_the_control(pipe: Any) -> None:
    edges = [detect("canny", picture) for picture in shapes()]
    maps = [np.asarray(edge)[..., 0] for edge in edges]
    prompts = ["3d emoji on a blue background"] * 4

    def fidelity(controls: list[Control], against: list[np.ndarray]) -> float:
        made = [cv2.Canny(image, 100, 200) for image in make(pipe, prompts, controls=controls)]
        return float(np.mean([edge_f1(a, b) for a, b in zip(made, against, strict=True)]))

    control = [Control("canny", edges)]
    followed, without, wrong = fidelity(control, maps), fidelity([], maps), fidelity(control, maps[1:] + maps[:1])
    print(f"edge F1: {followed:.2f} with the control, {without:.2f} without, {wrong:.2f} against another shape")
    assert followed > without + 0.15
    assert followed > wrong + 0.15


def test_the_commands_picture(tmp_path: Path) -> None:
    out = tmp_path / "horse.png"
    common = ["generate", "a brown horse on a blue background", "--steps", "12", "--seed", "1"]
    assert main([*common, "--control", f"canny={EXAMPLE}", "--out", str(out)]) == 0
    image = np.asarray(Image.open(out)).astype(int)
    assert min(image.shape[:2]) >= 48
    assert image.std() > 20, "grey"
    assert image[:3].mean((0, 1)).argmax() == 2, "the background is blue"


def test_image_to_image_and_inpainting(pipe: Any) -> None:
    start = shapes()[0]
    call = {"num_inference_steps": 12, "guidance_scale": 4.0, "generator": seeds(1)}
    near = np.asarray(pipe("3d emoji of an apple", image=start, strength=0.3, **call).images[0]).astype(int)
    assert np.abs(near - np.asarray(start)).mean() < 40
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    whole = {**call, "strength": 0.99, "output_type": "latent"}
    painted = pipe("3d emoji of an apple on a blue background", image=start, mask_image=mask, **whole).images
    pixels = pipe.image_processor.preprocess(start)
    kept = encode_picture(pipe.vae, pixels, seeds(1), torch.float32)
    difference = (painted - kept).abs()  # latents: the small decoder lets one half tint the other
    assert difference[..., 9:].mean() < 0.1
    assert difference[..., :7].mean() > 0.3
