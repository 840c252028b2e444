"""The embedded model: it is there, it follows captions, and its controls are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import light, seeds
from PIL import Image, ImageDraw

from diffusion_kit import AutoPipelineForText2Image, Control, detect
from diffusion_kit.cli import main
from diffusion_kit.evaluation.measures import measures_of
from diffusion_kit.models.sources import EMBEDDED, embedded
from diffusion_kit.models.vae import encode_picture

COLOURS = {"red": (220, 40, 40), "green": (50, 160, 60), "blue": (40, 80, 220), "yellow": (250, 210, 50)}
EXAMPLE = Path(__file__).parents[1] / "examples" / "horse.png"


LARGEST = {"default": 60e6, "default-kandinsky": 30e6}  # bytes


def load(name: str) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("default")


@pytest.fixture(scope="module")
def kandinsky() -> Any:
    return load("default-kandinsky")


@pytest.fixture(scope="module", params=LARGEST)
def each(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue({"default": "pipe", "default-kandinsky": "kandinsky"}[request.param])


def make(pipe: Any, prompts: list[str], **more: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    call = {"num_inference_steps": 12, "guidance_scale": 2.5, "generator": generators}
    return [np.asarray(image) for image in pipe(prompts, **{**call, **more}).images]


@pytest.mark.parametrize("name", LARGEST)
def test_files(name: str) -> None:
    assert EMBEDDED.keys() == LARGEST.keys()
    files = [file for file in embedded(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LARGEST[name]
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert (embedded(name) / "controls" / "canny" / "config.json").is_file()


def test_it_is_loaded_in_float32(each: Any) -> None:
    """Its files are in half precision, in which a CPU is slow."""
    nets = [part for part in each.components.values() if isinstance(part, torch.nn.Module)]
    nets.append(each.load_control("canny"))
    assert {weight.dtype for net in nets for weight in net.parameters()} == {torch.float32}


def test_backgrounds_have_the_colour_of_the_caption(each: Any) -> None:
    prompts = [f"3d emoji of {thing} on a {colour} background" for colour in COLOURS for thing in ("apple", "house")]
    right = 0
    for prompt, image in zip(prompts, make(each, prompts), strict=True):
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
        lambda d: d.rectangle((12, 12, 52, 52), fill="blue"),
        lambda d: d.polygon([(32, 8), (8, 54), (56, 54)], fill="green"),
        lambda d: d.polygon(star, fill="purple"),
    ):
        picture = Image.new("RGB", (64, 64), "white")
        draw_it(ImageDraw.Draw(picture))
        pictures.append(picture)
    return pictures


@pytest.mark.parametrize(
    "name", light(["canny", "canny_controlnet", "sketch", "palette", "regions"], "canny_controlnet")
)
def test_a_control_is_followed(pipe: Any, name: str) -> None:
    follows(pipe, name)


def test_the_hint_of_the_small_kandinsky_is_followed(kandinsky: Any) -> None:
    follows(kandinsky, "canny", "a red drawing on yellow")  # on white, without a colour, it is too pale for edges


def follows(pipe: Any, name: str, prompt: str = "3d emoji on a white background") -> None:
    """Closer to its own condition than without it, and than to another's."""
    detector = name.removesuffix("_controlnet")
    measure, found = measures_of(detector)[0], [detect(detector, picture) for picture in shapes()]
    prompts = [prompt] * len(found)

    def fidelity(controls: list[Control], against: list[Image.Image]) -> float:
        made = [detect(detector, Image.fromarray(picture)) for picture in make(pipe, prompts, controls=controls)]
        value = float(np.mean([measure.compare(a, b) for a, b in zip(made, against, strict=True)]))
        return value if measure.larger_is_better else -value / 100

    control = [Control(name, found)]
    followed, without, wrong = fidelity(control, found), fidelity([], found), fidelity(control, found[1:] + found[:1])
    print(f"{measure.name}: {followed:.2f} with {name}, {without:.2f} without, {wrong:.2f} against another shape")
    assert followed > without + 0.1
    assert followed > wrong + 0.1


def test_guidance_over_the_image_follows_lines_closer(pipe: Any) -> None:
    edges = [detect("canny", picture) for picture in shapes()]
    prompts, compare = ["3d emoji on a blue background"] * len(edges), measures_of("canny")[0].compare

    def fidelity(guidance: float | None) -> float:
        made = make(pipe, prompts, controls=[Control("canny", edges, guidance=guidance)])
        return float(
            np.mean([compare(detect("canny", Image.fromarray(a)), b) for a, b in zip(made, edges, strict=True)])
        )

    assert fidelity(2) > fidelity(None) + 0.03


@pytest.mark.parametrize(
    ("model", "control"),
    [
        ("default", f"canny={EXAMPLE},guidance=2"),
        ("default", f"regions={EXAMPLE}"),
        ("default-kandinsky", f"canny={EXAMPLE}"),
    ],
)
def test_the_commands_picture(model: str, control: str, tmp_path: Path) -> None:
    out = tmp_path / "horse.png"
    common = ["generate", "a brown horse on a blue background", "--model", model, "--steps", "12", "--seed", "2"]
    assert main([*common, "--control", control, "--out", str(out)]) == 0
    image = np.asarray(Image.open(out)).astype(int)
    assert min(image.shape[:2]) >= 48
    assert image.std() > 20, "grey"
    assert image[:3].mean((0, 1)).argmax() == 2, "the background is blue"


def test_image_to_image_and_inpainting(pipe: Any) -> None:
    start = shapes()[0]
    call = {"num_inference_steps": 12, "guidance_scale": 2.5, "generator": seeds(1)}
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
