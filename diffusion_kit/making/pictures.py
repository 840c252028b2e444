"""From a job to its whole recipe, and from a recipe to its picture, by a loaded model."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.control import Control, granularity, shown_as
from diffusion_kit.adapters.detectors import detect
from diffusion_kit.adapters.pictures import INSIDE, MEGAPIXELS, fit_image, load_image
from diffusion_kit.models.card import settled
from diffusion_kit.pipelines.canvas import rounded
from diffusion_kit.pipelines.optimize import name_of
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe

from .fingerprint import short
from .job import Job, Settings, without_auto

PACKAGES = ("diffusion_kit", "torch", "diffusers", "transformers")
STEPS = 30  # where neither the user nor the model's card says
NARROWEST = 4  # sides of a result at most as 1 to 4, whatever the picture's shape


def opened(ref: FileRef) -> Image.Image:
    return load_image(ref.open(), name=ref.path)


def complete(pipe: Any, job: Job, settings: Settings, seed: int, hash_of: Callable[[Any], str]) -> Recipe:
    """The whole recipe of one picture: what the model says is filled in, and the hashes of all networks."""
    own = pipe.control_names
    controls = tuple(_hashed(pipe, without_auto(control, own), hash_of) for control in job.controls)
    nets = [pipe.load_control(control.kind) for control in controls]
    multiple = granularity(pipe.size_multiple, nets)
    first = next((opened(ref) for ref in [job.image, *(c.image for c in controls)] if ref is not None), None)
    width, height = settings.size or natural_size(pipe, first, multiple)
    height, width = rounded("--size", height, width, multiple)
    if width * height > MEGAPIXELS * 1e6:
        raise ValueError(f"--size is {width} x {height}; at most {MEGAPIXELS} megapixels are made")
    given, usual = (settings.steps, settings.guidance_scale), (STEPS, pipe.Call.guidance_scale)
    steps, guidance = settled(pipe.config.get("_name_or_path", ""), given, usual)
    strength = pipe.Call.strengths[job.mask is not None] if settings.strength is None else settings.strength
    return Recipe(
        prompt=job.prompt,
        negative_prompt=settings.negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        model=settings.model,
        model_hash=hash_of(settings.model),
        scheduler=type(pipe.scheduler).__name__,
        scheduler_config=dict(pipe.scheduler.config),
        strength=None if job.image is None else strength,
        image=job.image,
        mask=job.mask,
        controls=controls,
        fit=settings.fit,
        dtype=name_of(pipe.unet.dtype),
        device=str(pipe._execution_device),
        optimize=settings.optimize,
        engine=None if settings.optimize is None else pipe.engine.name,
        low_memory=settings.low_memory,
        versions=versions(),
    )


def _hashed(pipe: Any, control: ControlRecipe, hash_of: Callable[[Any], str]) -> ControlRecipe:
    """The control with its network's hash, which has to be that of an old recipe: nothing is fetched for one."""
    if control.hash is None:
        pipe.load_control(control.kind)  # a hub id has no hash before it is in the cache
    found = hash_of(pipe.control_source(control.kind))
    if control.hash is not None and control.hash != found:
        raise ValueError(
            f"the picture was made with the control {control.kind} of {short(control.hash)}; what stands there now has "
            f"{short(found)}: give --control to use it all the same"
        )
    return replace(control, hash=found)


def natural_size(pipe: Any, picture: Image.Image | None, multiple: int) -> tuple[int, int]:
    """Width and height: the model's own area in the shape of the picture, in multiples that its networks divide."""
    height, width = pipe.native_size
    if picture is None:
        return width, height
    side = math.sqrt(width * height)
    multiple = math.lcm(multiple, pipe.size_multiple * max(1, round(side) // 128))
    ratio = min(max(picture.width / picture.height, 1 / NARROWEST), NARROWEST) ** 0.5
    wide, high = (max(multiple, round(side * f / multiple) * multiple) for f in (ratio, 1 / ratio))
    return wide, high


@dataclass(frozen=True)
class Made:
    """A picture, and the control images as the networks saw them, in the controls' order and at the picture's size."""

    picture: Image.Image
    shown: tuple[Image.Image, ...]


OnStep = Callable[[int, int, Tensor | None], None]


def make_picture(pipe: Any, recipe: Recipe) -> Image.Image:
    """Runs a recipe; the result is a function of the recipe and of the files that it names."""
    return make(pipe, recipe).picture


def make(pipe: Any, recipe: Recipe, on_step: OnStep | None = None, *, preview: bool = False) -> Made:
    """Runs a recipe.

    Args:
        on_step: told how many calls of the network are done, of how many; and, where there is to be a `preview`, the
            picture so far (3, h, w) in [0, 1]. What it raises ends the run; the pipeline is then as it was.
    """
    controls = [make_control(pipe, control, recipe) for control in recipe.controls]
    call: dict[str, Any] = {}
    if on_step is not None:
        call["callback_on_step_end"] = _told(on_step)
        call["callback_on_step_end_tensor_inputs"] = ["preview"] if preview else []
    if recipe.image is not None:
        call |= {"image": opened(recipe.image), "strength": recipe.strength}
        call |= {"mask_image": opened(recipe.mask)} if recipe.mask is not None else {}
    made = pipe(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        controls=controls,
        fit=recipe.fit,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),
        width=recipe.width,
        height=recipe.height,
        **call,
    )
    return Made(made.images[0], tuple(as_seen(control, recipe) for control in controls))


def as_seen(control: Control, recipe: Recipe) -> Image.Image:
    """The image of a recipe's control at the picture's size; of a network for several types of pictures, the first."""
    image = next(iter(control.image.values())) if isinstance(control.image, dict) else control.image
    return fit_image(image, recipe.width, recipe.height, recipe.fit)


def _told(on_step: OnStep) -> Callable[..., dict[str, Any]]:
    def after_call(pipe: Any, k: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        on_step(k + 1, pipe.num_timesteps, tensors["preview"][0] if "preview" in tensors else None)
        return {}

    return after_call


def make_control(pipe: Any, control: ControlRecipe, recipe: Recipe) -> Control:
    net, picture, name = pipe.load_control(control.kind), opened(control.image), None
    if control.detect is not None:
        name, _, model = control.detect.partition(":")
        options: dict[str, Any] = {"model": model} if model else {}
        picture = detect(name, _shaped(picture, recipe), **options)
    kind = control.type or name
    if kind is None and shown_as(net, None, picture) is not picture:
        raise ValueError(
            f"--control {control.kind} has several types of pictures: say which, type=canny or detect=canny"
        )
    return Control(
        net,
        shown_as(net, kind, picture),
        mask=None if control.mask is None else opened(control.mask),
        **numbers(control),
    )


def numbers(control: ControlRecipe) -> dict[str, Any]:
    """How a control acts."""
    return {name: getattr(control, name) for name in ("scale", "start", "end", "mode", "guidance", "background")}


def _shaped(picture: Image.Image, recipe: Recipe) -> Image.Image:
    """The photo as a detector should see it: at the size at which its map is used, without the bars of "contain"."""
    return fit_image(picture, recipe.width, recipe.height, INSIDE if recipe.fit == "contain" else recipe.fit)


def grid_of(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All pictures in rows of `columns` (by default nearly a square), in cells of the largest one's size."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for k, picture in enumerate(pictures):
        sheet.paste(fit_image(picture, width, height, "contain"), (k % columns * width, k // columns * height))
    return sheet


def versions() -> dict[str, str]:
    """Of what makes pictures; without a package that has none, as the kit in a checkout that was not installed."""
    return {name: found for name in PACKAGES if (found := version(name)) is not None}


@cache  # it looks through all that is installed
def version(package: str) -> str | None:
    found = next(iter(importlib.metadata.distributions(name=package)), None)
    return None if found is None else found.version
