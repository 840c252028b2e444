"""`diffusion-kit generate`: pictures from prompts, controls and pictures, and the same again from a picture's recipe."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diffusion_kit.recipes import FileRef, ForeignRecipe, Recipe, check, read, save

from .console import note
from .jobs import OPTIONS, Job, make_jobs
from .outputs import free_files, output_files, output_folder, writable

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?")
    add("--prompts", metavar="PATH", help="a folder of .txt files, or a text file with a prompt a line")
    add("--again", metavar="PICTURE", help="make this picture again; every option that is given changes its recipe")
    add("--model", help="'default' (embedded), a folder, a .safetensors file or a hub id")
    add("--negative-prompt", metavar="TEXT", help="what the picture should not be")
    add(
        "--control",
        action="append",
        default=[],
        metavar=f"KIND=IMAGE[,{'=..,'.join(OPTIONS)}=..]",
        help="repeatable; KIND is a control that comes with the model (canny), or an adapter's folder, file or hub id; "
        "a named kind runs its own detector on IMAGE unless detect=none; detect=NAME or NAME:MODEL runs another; "
        "IMAGE may be a folder",
    )
    add("--image", metavar="FILE", help="picture to start from, or a folder of them")
    add(
        "--strength",
        type=float,
        help="share of the steps that --image leaves to the model, 0 to 1; by default 0.3 for SDXL, 0.8 for Stable "
        "Diffusion, and all of them with --mask",
    )
    add("--mask", metavar="FILE", help="greyscale, white is repainted; or a folder of masks")
    add(
        "--fit", help="how pictures of another shape are brought to the output's: cover (the default), contain, stretch"
    )
    add("--steps", type=int, help="by default what the model's card says, else 30")
    add(
        "--guidance-scale",
        type=float,
        help="by default what the model's card says, else 5 for SDXL, 7.5 for Stable Diffusion",
    )
    add("--seed", type=int, help="random, and printed, if not given")
    add("--size", metavar="WxH", help="by default the model's area in the shape of the first picture given")
    add("--count", type=int, default=1, help="pictures of each prompt, with the seeds SEED, SEED + 1, ...")
    add("--out", metavar="FILE", help="PNG, JPEG or WEBP, numbered with --count; or a folder")
    add("--grid", metavar="FILE", help="all pictures side by side in one file too")
    add("--embed-controls", action="store_true", help="keep the pictures given in the recipe, not only their hashes")
    add("--scheduler", metavar="CLASS", help="a diffusers scheduler, for example EulerAncestralDiscreteScheduler")
    add("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one")
    add("--dtype", choices=DTYPES, help="by default float32")


@dataclass(frozen=True)
class Settings:
    """What is the same for all pictures of a call: given, or of the recipe, or by default; None where the model says.

    Attributes:
        old: the recipe of --again. other_model: a model was given, which may be another than the recipe's.
    """

    model: str
    negative_prompt: str | None
    steps: int | None
    guidance_scale: float | None
    seed: int
    size: tuple[int, int] | None
    strength: float | None
    fit: str
    dtype: str
    device: str | None
    scheduler: str | None
    old: Recipe | None
    other_model: bool


def run(options: argparse.Namespace) -> None:
    """Checks what can be checked, then loads, makes and saves."""
    if options.count < 1:
        raise ValueError(f"--count is {options.count}; it must be 1 or more")
    old = read(options.again) if options.again else None
    if isinstance(old, ForeignRecipe):
        _note_of_foreign(old, options)
    settings = settle(options, old)
    own = old if isinstance(old, Recipe) else None
    prompt = options.prompt if options.prompt is not None or old is None else old.prompt
    jobs = make_jobs(options, own, prompt)
    from diffusion_kit.commands.fingerprint import fingerprint

    from . import pictures

    pictures.check(jobs, settings, options.count)
    given = [Path(ref.path) for job in jobs for ref in _refs(job)]
    given += [Path(options.again)] if options.again else []
    files = _files(options, jobs, given)
    grid = output_files(options.grid, [""], taken=[*files, *given]) if options.grid else []
    pipe = pictures.load_pipeline(settings, debug=options.debug)
    if own is not None:
        _note_of_versions(own)
    hash_of, made = cache(fingerprint), []
    for number, file in enumerate(files):
        job, k = jobs[number // options.count], number % options.count
        recipe = pictures.complete(pipe, job, settings, settings.seed + k, hash_of)
        check(file, recipe)
        picture = pictures.make_picture(pipe, recipe)
        save(picture, file, recipe)
        print(f"{file}  {recipe.width} x {recipe.height}, seed {recipe.seed}")
        made += [picture] if grid else []
    for file in grid:
        save(pictures.grid_of(made, columns=options.count if len(jobs) > 1 and options.count > 1 else None), file)
        print(file)


def settle(options: argparse.Namespace, old: Recipe | ForeignRecipe | None) -> Settings:
    """Every setting: the option that is given, else the recipe's, else the default."""
    own = old if isinstance(old, Recipe) else None

    def first(given: Any, name: str, default: Any = None) -> Any:
        found = given if given is not None else getattr(old, name, None)
        return default if found is None else found

    size = parse_size(options.size) if options.size else None
    if size is None and old is not None and old.width and old.height:
        size = old.width, old.height
    return Settings(
        model=options.model or (own.model if own else "default"),
        negative_prompt=first(options.negative_prompt, "negative_prompt"),
        steps=first(options.steps, "steps"),
        guidance_scale=first(options.guidance_scale, "guidance_scale"),
        seed=first(options.seed, "seed", int.from_bytes(os.urandom(4), "little")),
        size=size,
        strength=first(options.strength, "strength"),
        fit=first(options.fit, "fit", "cover"),
        dtype=first(options.dtype, "dtype", "float32"),
        device=first(options.device, "device"),
        scheduler=options.scheduler,
        old=own,
        other_model=options.model is not None,
    )


def parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--size is {text!r}; it must be WIDTHxHEIGHT, for example 1024x768")
    return int(parts[0]), int(parts[1])


def _refs(job: Job) -> list[FileRef]:
    """The pictures that a job is made from."""
    refs = [job.image, job.mask, *(ref for c in job.controls for ref in (c.image, c.mask))]
    return [ref for ref in refs if ref is not None]


def _files(options: argparse.Namespace, jobs: list[Job], given: list[Path]) -> list[Path]:
    """A file for each picture: jobs after one another, in each the counted ones; none of those `given`."""
    ends = [""] if options.count == 1 else [str(k) for k in range(1, options.count + 1)]
    if not jobs[0].name:
        return output_files(options.out, ends, taken=given)
    folder = output_folder(options.out)
    files: list[Path] = []
    for job in jobs:
        files += free_files(folder / f"{job.name}.png", ends, files)
    return writable(files)


def _note_of_foreign(old: ForeignRecipe, options: argparse.Namespace) -> None:
    if options.model is None:
        model = f" with the model {old.model}" if old.model else ""
        raise ValueError(f"{options.again} was made by {old.software}{model}: give --model, it is not looked for")
    lacks = [name for name in ("prompt", "seed", "steps", "guidance_scale") if getattr(old, name) is None]
    lost = [f"its sampler ({old.sampler}) is not taken over" if old.sampler else "its sampler is not known"]
    lost += [f"it does not say {', '.join(lacks)}"] if lacks else []
    note(f"{options.again} was made by {old.software}: {'; '.join(lost)}")


def _note_of_versions(old: Recipe) -> None:
    from .pictures import versions

    now = versions()
    others = [f"{name} {value} (now {now.get(name)})" for name, value in old.versions.items() if now.get(name) != value]
    if others:
        note(f"made with {', '.join(others)}: pixels may differ")
