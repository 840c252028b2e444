"""What may be asked of the studio, as the page and the HTTP interface send it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_kit.making.check import MOST_STEPS
from diffusion_kit.making.job import AUTO, Job, Settings
from diffusion_kit.recipes import ControlRecipe

from .config import StudioConfig
from .inputs import Inputs
from .library import Library

Fraction = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Base64 = Annotated[str, Field(description="a PNG, JPEG or WEBP in base64; files and URLs are not followed")]
MOST_CONTROLS = 8
LARGEST_SIDE = 4096  # pixels, of what a detector sees


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ControlRequest(Request):
    """A control; see `diffusion_kit.Control`.

    Attributes:
        kind: one that comes with the model, or of the studio's folders.
        detect: the detector that makes the control image of `image`; "auto": the control's own, "none": it is one already.
        type: what the picture shows, for a ControlNet-Union.
    """

    kind: str
    image: Base64
    detect: str = AUTO
    scale: Finite | list[Finite] = 1.0
    start: Fraction = 0.0
    end: Fraction = 1.0
    mode: Literal["balanced", "prompt", "control"] = "balanced"
    mask: Base64 | None = None
    guidance: Finite | None = None
    background: Fraction = 0.0
    type: str | None = None


class PictureRequest(Request):
    """A picture; with `image` by image-to-image, with `mask` (white is repainted) too by inpainting.

    Attributes:
        model: of the studio's; None: the first.
        seed: None: a random one, which the answer says.
        steps, guidance_scale: None: as the model's card says.
        width, height: in pixels; None: the model's area in the shape of the first picture given.
    """

    prompt: str = Field(max_length=10_000)
    negative_prompt: str | None = Field(None, max_length=10_000)
    model: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance_scale: Finite | None = None
    scheduler: str | None = None
    width: int | None = Field(None, ge=8)
    height: int | None = Field(None, ge=8)
    image: Base64 | None = None
    mask: Base64 | None = None
    strength: Fraction | None = None
    fit: Literal["cover", "contain", "stretch"] = "cover"
    controls: list[ControlRequest] = Field([], max_length=MOST_CONTROLS)


class DetectRequest(Request):
    """A control image of a photo, by a detector of the kit."""

    detector: str
    image: Base64
    detect_resolution: int | None = Field(None, ge=1, le=LARGEST_SIDE)
    image_resolution: int | None = Field(None, ge=1, le=LARGEST_SIDE)
    invert: bool = False


@dataclass(frozen=True)
class Asked:
    """A picture to be made: what `making` takes."""

    job: Job
    settings: Settings
    seed: int


def asked(request: PictureRequest, config: StudioConfig, library: Library, inputs: Inputs) -> Asked:
    """Keeps the request's pictures, and looks up its model.

    Raises:
        ValueError: a picture or a model that cannot be used, in one line.
    """
    size = (request.width, request.height) if request.width and request.height else None
    if (request.width is None) != (request.height is None):
        raise ValueError("give width and height, or neither")
    settings = replace(
        settings_of(config, library.model(request.model or library.first)),
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
        size=size,
        strength=request.strength,
        fit=request.fit,
    )
    checked(Job("", request.prompt, None, None, ()), settings, request.seed, config)  # before anything is kept
    controls = tuple(control_recipe(own, k, inputs) for k, own in enumerate(request.controls, 1))
    image = None if request.image is None else inputs.add_base64(request.image, "image")
    mask = None if request.mask is None else inputs.add_base64(request.mask, "mask")
    return checked(Job("", request.prompt, image, mask, controls), settings, request.seed, config)


def control_recipe(request: ControlRequest, number: int, inputs: Inputs) -> ControlRecipe:
    check_detector(request.detect)
    acts = request.model_dump(include={"kind", "detect", "start", "end", "mode", "guidance", "background", "type"})
    scale = tuple(request.scale) if isinstance(request.scale, list) else request.scale
    image = inputs.add_base64(request.image, f"image of control {number}")
    mask = None if request.mask is None else inputs.add_base64(request.mask, f"mask of control {number}")
    return ControlRecipe(image=image, mask=mask, scale=scale, **acts)


def check_detector(name: str) -> None:
    """
    Raises:
        ValueError: weights of a detector are named, which would be any file of this machine.
    """
    if ":" in name:
        raise ValueError(f"detect is {name!r}; the studio takes a detector's name alone")


def settings_of(config: StudioConfig, model: str) -> Settings:
    """What is the same in all pictures of the studio; the rest as the model says."""
    none = dict.fromkeys(("negative_prompt", "steps", "guidance_scale", "size", "strength", "scheduler", "old"))
    same = {name: getattr(config, name) for name in ("device", "optimize", "engine", "low_memory")}
    fixed = {"model": model, "dtype": config.dtype or "float32", "seed": 0, "fit": "cover", "other_model": True}
    return Settings(**none, **same, **fixed)  # type: ignore[arg-type]


def checked(job: Job, settings: Settings, seed: int | None, config: StudioConfig) -> Asked:
    """
    Args:
        seed: None: a random one.

    Raises:
        ValueError: a mask without a picture, too many pixels.
    """
    if job.image is None and job.mask is not None:
        raise ValueError("a mask needs the picture that it repaints")
    size = settings.size
    if size is not None and size[0] * size[1] > config.megapixels * 1e6:
        raise ValueError(f"size is {size[0]} x {size[1]}; this studio makes {config.megapixels:g} megapixels at most")
    settings = replace(settings, negative_prompt=settings.negative_prompt or None)
    return Asked(job, settings, secrets.randbelow(2**32) if seed is None else seed)
