"""A recipe as a command line and as Python: both make the same pixels as the studio did."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from typing import Any

from diffusion_kit.recipes import ControlRecipe, Recipe

DEFAULTS = {"start": 0.0, "end": 1.0, "mode": "balanced", "guidance": None, "background": 0.0, "type": None}


def command(recipe: Recipe) -> str:
    """`diffusion-kit generate ...`, in lines."""
    own = [f"{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}" for name, value in options(recipe)]
    own += ["--low-memory"] * recipe.low_memory
    if recipe.prompt.startswith("-"):  # which is no option
        parts = ["diffusion-kit generate", *own, f"-- {shlex.quote(recipe.prompt)}"]
    else:
        parts = [f"diffusion-kit generate {shlex.quote(recipe.prompt)}", *own]
    return " \\\n  ".join(parts)


def options(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "--model", recipe.model
    if recipe.negative_prompt:
        yield "--negative-prompt", recipe.negative_prompt
    for control in recipe.controls:
        yield "--control", control_option(control)
    if recipe.image is not None:
        yield "--image", recipe.image.path
        yield "--strength", f"{recipe.strength}"
    if recipe.mask is not None:
        yield "--mask", recipe.mask.path
    if recipe.image is not None or recipe.controls:
        yield "--fit", recipe.fit
    yield "--steps", f"{recipe.steps}"
    yield "--guidance-scale", f"{recipe.guidance_scale}"
    yield "--size", f"{recipe.width}x{recipe.height}"
    yield "--seed", f"{recipe.seed}"
    yield "--scheduler", recipe.scheduler
    yield "--device", recipe.device
    if recipe.optimize is None or recipe.optimize == "exact":
        yield "--dtype", recipe.dtype
    if recipe.optimize is not None:
        yield "--optimize", recipe.optimize
        yield "--engine", f"{recipe.engine}"


def control_option(control: ControlRecipe) -> str:
    """KIND=IMAGE[,option=value...]."""
    scale = control.scale
    parts = [f"{control.kind}={control.image.path}", f"detect={control.detect or 'none'}"]
    parts.append(f"scale={':'.join(map(str, scale)) if isinstance(scale, tuple) else scale}")
    parts += [f"{name}={value}" for name, value in changed(control)]
    parts += [f"mask={control.mask.path}"] if control.mask is not None else []
    return ",".join(parts)


def changed(control: ControlRecipe) -> Iterator[tuple[str, Any]]:
    """Of how a control acts, what is not by default."""
    for name, usual in DEFAULTS.items():
        if (value := getattr(control, name)) != usual:
            yield name, value


def python(recipe: Recipe, by_type: Collection[str] = ()) -> str:
    """A script over the public API.

    Args:
        by_type: kinds of the recipe's controls whose network takes pictures by their types (ControlNet-Union).
    """
    own = recipe.scheduler
    names = ["AutoPipelineForText2Image", own, *(["Control"] if recipe.controls else [])]
    names += ["detect"] if any(control.detect for control in recipe.controls) else []
    names += ["load_image"] if recipe.image is not None or recipe.controls else []
    names.sort(key=str.lower)
    lines = ["import torch", "", f"from diffusion_kit import {', '.join(names)}"]
    lines += ["from diffusion_kit.utils import fit_image"] if "detect" in names else []
    loading = f"pipe = AutoPipelineForText2Image.from_pretrained({recipe.model!r}, torch_dtype=torch.{recipe.dtype})"
    if recipe.low_memory and recipe.device != "cpu":  # the whole may be more than there is
        lines += ["", loading, f"pipe.enable_model_cpu_offload(device={recipe.device!r})"]
    else:
        lines += ["", f"{loading}.to({recipe.device!r})"]
    lines.append(f"pipe.scheduler = {own}.from_config(pipe.scheduler.config)")
    if recipe.optimize is not None:
        low = ", low_memory=True" if recipe.low_memory else ""
        lines.append(f"pipe.optimize({recipe.optimize!r}, engine={recipe.engine!r}{low})")
    lines += [f"images = pipe(\n    {recipe.prompt!r},", *(f"    {line}," for line in arguments(recipe, by_type))]
    return "\n".join([*lines, ").images", 'images[0].save("picture.png")', ""])


def arguments(recipe: Recipe, by_type: Collection[str]) -> Iterator[str]:
    """Of the pipeline's call, after the prompt."""
    if recipe.negative_prompt is not None:
        yield f"negative_prompt={recipe.negative_prompt!r}"
    if recipe.controls:
        own = "".join(f"        {control_value(control, recipe, by_type)},\n" for control in recipe.controls)
        yield f"controls=[\n{own}    ]"
    if recipe.image is not None:
        yield f"image=load_image({recipe.image.path!r})"
        yield f"strength={recipe.strength}"
    if recipe.mask is not None:
        yield f"mask_image=load_image({recipe.mask.path!r})"
    yield f"fit={recipe.fit!r}"
    yield f"num_inference_steps={recipe.steps}"
    yield f"guidance_scale={recipe.guidance_scale}"
    yield f"width={recipe.width}"
    yield f"height={recipe.height}"
    yield f'generator=torch.Generator("cpu").manual_seed({recipe.seed})'


def control_value(control: ControlRecipe, recipe: Recipe, by_type: Collection[str]) -> str:
    image, name = f"load_image({control.image.path!r})", None
    if control.detect is not None:
        name, _, model = control.detect.partition(":")
        fit = "inside" if recipe.fit == "contain" else recipe.fit
        seen = f"fit_image({image}, {recipe.width}, {recipe.height}, {fit!r})"
        image = f"detect({name!r}, {seen}{f', model={model!r}' if model else ''})"
    if control.kind in by_type:
        image = f"{{{control.type or name!r}: {image}}}"
    parts = [repr(control.kind), image, f"scale={control.scale}"]
    parts += [f"{name}={value!r}" for name, value in changed(control) if name != "type"]
    parts += [f"mask=load_image({control.mask.path!r})"] if control.mask is not None else []
    return f"Control({', '.join(parts)})"
