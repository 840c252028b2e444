"""From recipes to pictures: loading what a recipe names and running it. The heavy half of `generate`."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from diffusion_kit.adapters.control import Control, granularity, shown_as
from diffusion_kit.adapters.detectors import detect, detector
from diffusion_kit.adapters.pictures import FITS, MEGAPIXELS, fit_image, load_image, resize
from diffusion_kit.commands.fingerprint import fingerprint
from diffusion_kit.models.card import settled
from diffusion_kit.pipelines.auto import AutoPipelineForText2Image
from diffusion_kit.pipelines.canvas import rounded
from diffusion_kit.pipelines.engines import missing
from diffusion_kit.pipelines.optimize import LEVELS, half_of, name_of
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe

from .console import note
from .execution import DTYPES, HALVED
from .jobs import AUTO, Job, without_auto
from .plan import Settings

PACKAGES = ("diffusion_kit", "torch", "diffusers", "transformers")
STEPS, MOST_STEPS = 30, 10_000
NARROWEST = 4  # sides of a result at most as 1 to 4, whatever the picture's shape


def check(job: Job, settings: Settings, seed: int) -> None:
    """What can be wrong before a model is loaded: pictures, windows and scales, names of detectors, fit, device."""
    if settings.steps is not None and not 1 <= settings.steps <= MOST_STEPS:
        raise ValueError(f"--steps is {settings.steps}; it must be 1 to {MOST_STEPS}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be 0 or more, and below 2^63 for every picture")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype is {settings.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if not math.isfinite(settings.guidance_scale or 0):
        raise ValueError(f"--guidance-scale is {settings.guidance_scale}; it must be a finite number")
    if settings.fit not in FITS:
        raise ValueError(f"--fit is {settings.fit!r}; it must be one of {', '.join(FITS)}")
    if settings.strength is not None and not 0 <= settings.strength <= 1:
        raise ValueError(f"--strength is {settings.strength}; it must be between 0 and 1")
    _check_job(job, settings.old)
    check_execution(settings)


def check_execution(settings: Settings) -> None:
    """The device, the level of --optimize, and whether the engine can execute there."""
    if settings.optimize not in (None, *LEVELS):
        raise ValueError(f"--optimize is {settings.optimize!r}; it must be one of {', '.join(LEVELS)}")
    device = torch.device(device_of(settings))
    asked = settings.engine if settings.engine != getattr(settings.old, "engine", None) else None
    if asked is not None and (why := missing(asked, device, dtype_of(settings))) is not None:
        raise ValueError(f"--engine {asked}: {why}")


def _check_job(job: Job, old: Recipe | None) -> None:
    for ref in (job.image, job.mask, *(ref for c in job.controls for ref in (c.image, c.mask))):
        if ref is not None:
            opened(ref)
    for control in job.controls:
        if old is not None and control in old.controls and control.hash is None:
            raise ValueError(f"the recipe has no hash of its control {control.kind}: give --control to use it")
        Control(control.kind, None, **numbers(control))
        if control.detect not in (AUTO, None, "none"):
            detector(control.detect.partition(":")[0])


def opened(ref: FileRef) -> Image.Image:
    return load_image(ref.open(), name=ref.path)


def device_of(settings: Settings) -> str:
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"no device {device!r} here; --device cpu always works") from None
    return device


def dtype_of(settings: Settings) -> torch.dtype:
    """The number type in which a model is loaded: that of the level of --optimize, else as asked for."""
    if settings.optimize in HALVED:
        return half_of(torch.device(device_of(settings)))
    return getattr(torch, settings.dtype)


def load_pipeline(settings: Settings, *, debug: bool, **components: Any) -> Any:
    """The model on its device, quiet but for its progress bar; with `components` in place of its own."""
    if not debug:
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    same = _same_model(settings)
    old = settings.old if same else None
    name = settings.scheduler or (old.scheduler if old else None)
    scheduler = None if name is None else _scheduler(name)
    commit = (old.model_hash or "").partition("commit:")[2] if old else ""
    more: dict[str, Any] = {"revision": commit} if commit else {}  # what was compared is what is loaded
    more |= components
    pipe = AutoPipelineForText2Image.from_pretrained(settings.model, torch_dtype=dtype_of(settings), **more)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(old.scheduler_config if old else pipe.scheduler.config)
    device = device_of(settings)
    if settings.low_memory and device != "cpu":  # the whole may be more than there is
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe = pipe.to(device)
    if settings.optimize is not None:
        _optimize(pipe, settings)
    return pipe


def _optimize(pipe: Any, settings: Settings) -> None:
    """Says which engine was chosen and why; where an old recipe's engine is not here, another takes its place."""
    name = settings.engine
    own = settings.old is not None and name == settings.old.engine
    if own and name is not None and (why := missing(name, pipe.device, pipe.dtype)) is not None:
        note(f"made by the engine {name}, and {why}: pixels may differ by rounding")
        name = None
    pipe.optimize(settings.optimize, engine=name, low_memory=settings.low_memory)
    for line in pipe.notes:
        note(line)
    pipe.engine.listener = note


def _same_model(settings: Settings) -> bool:
    """Whether the model is that of an old recipe. Nothing is fetched from the hub for an old recipe's own model.

    Raises:
        ValueError: it is not, and no other was asked for. FileNotFoundError: it is not here.
    """
    old = settings.old
    if old is None:
        return False
    if old.model_hash is None and not settings.other_model:
        raise ValueError(f"the recipe has no hash of its model {settings.model}: give --model to use it all the same")
    try:
        found = fingerprint(settings.model)
    except FileNotFoundError as error:
        if settings.other_model:  # of the hub, and not here yet
            return False
        raise FileNotFoundError(f"{error}: give --model {settings.model} to look for it elsewhere") from None
    if found == old.model_hash:
        return True
    if settings.other_model:
        note("another model than the recipe's: its own scheduler is used unless --scheduler says otherwise")
        return False
    raise ValueError(
        f"the picture was made with the model {settings.model} of {_short(str(old.model_hash))}; "
        f"what stands there now has {_short(found)}: give --model to use it all the same"
    )


def _short(digest: str) -> str:
    return digest[:19]


def _scheduler(name: str) -> Any:
    import difflib

    known = [other for other in dir(diffusers) if other.endswith("Scheduler") and not other.startswith("Flax")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.3)
        raise ValueError(f"no scheduler {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    scheduler = getattr(diffusers, name)
    if not hasattr(scheduler, "scale_model_input"):
        raise ValueError(f"{name} is made for models of another kind (flow matching), which this version does not have")
    return scheduler


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
        versions=versions(),
    )


def _hashed(pipe: Any, control: ControlRecipe, hash_of: Callable[[Any], str]) -> ControlRecipe:
    """The control with its network's hash, which has to be that of an old recipe: nothing is fetched for one."""
    if control.hash is None:
        pipe.load_control(control.kind)  # a hub id has no hash before it is in the cache
    found = hash_of(pipe.control_source(control.kind))
    if control.hash is not None and control.hash != found:
        raise ValueError(
            f"the picture was made with the control {control.kind} of {_short(control.hash)}; what stands there now has "
            f"{_short(found)}: give --control to use it all the same"
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


def make_picture(pipe: Any, recipe: Recipe) -> Image.Image:
    """Runs a recipe; the result is a function of the recipe and of the files that it names."""
    call: dict[str, Any] = {}
    if recipe.image is not None:
        call |= {"image": opened(recipe.image), "strength": recipe.strength}
        call |= {"mask_image": opened(recipe.mask)} if recipe.mask is not None else {}
    made = pipe(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        controls=[make_control(pipe, control, recipe) for control in recipe.controls],
        fit=recipe.fit,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),
        width=recipe.width,
        height=recipe.height,
        **call,
    )
    return made.images[0]


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
    if recipe.fit != "contain":
        return fit_image(picture, recipe.width, recipe.height, recipe.fit)
    scale = min(recipe.width / picture.width, recipe.height / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return resize(picture, (width, height))


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
    found = {name: list(importlib.metadata.distributions(name=name))[:1] for name in PACKAGES}
    return {name: own[0].version for name, own in found.items() if own}
