"""What a call of `generate` plans: settings, and each picture with its seed and file."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_kit.making.job import HALVED, Job, Settings
from diffusion_kit.recipes import ForeignRecipe, Recipe

from .execution import level_of
from .job_file import in_line, read_lines
from .jobs import make_jobs
from .outputs import free_files, is_chosen, output_files, output_folder, writable


@dataclass(frozen=True)
class Planned:
    """A picture to be made, and where to; `line` is that of the job file.

    Attributes:
        chosen: whether the file's name is the command's choice (see `outputs.is_chosen`).
    """

    job: Job
    settings: Settings
    seed: int
    file: Path
    line: int | None = None
    chosen: bool = False


def plan_of_call(options: argparse.Namespace, old: Recipe | ForeignRecipe | None) -> list[Planned]:
    """The pictures that the options ask for: jobs after one another, in each the counted ones."""
    settings = settle(options, old)
    prompt = options.prompt if options.prompt is not None or old is None else old.prompt
    jobs = make_jobs(options, old if isinstance(old, Recipe) else None, prompt)
    plan = [Planned(job, settings, settings.seed + k, Path()) for job in jobs for k in range(options.count)]
    files = _files(options, jobs, files_read(options, plan))
    chosen = is_chosen(options.out)
    return [replace(each, file=file, chosen=chosen) for each, file in zip(plan, files, strict=True)]


def plan_of_file(options: argparse.Namespace) -> list[Planned]:
    """The pictures of every line of a job file, under its own name, or its number, in the folder `--out`.

    Raises:
        ValueError: what the file, one of its lines, or the folder has wrong.
    """
    lines = read_lines(options)
    folder = output_folder(options.out)
    plan: list[Planned] = []
    taken: set[Path] = set()
    for number, line in lines.items():
        with in_line(options.jobs, number):
            own = plan_of_line(line, number, folder, str(number))
            if met := next((each.file for each in own if each.file in taken), None):
                raise ValueError(f"{met.name} is the picture of another line: give another out")
        plan += own
        taken |= {each.file for each in own}
    writable([each.file for each in plan])
    return plan


def plan_of_line(line: argparse.Namespace, number: int, folder: Path, name: str) -> list[Planned]:
    line.seed = line.seed or 0  # not a random one: the picture would not be known again
    settings, jobs = settle(line, None), make_jobs(line, None, line.prompt)
    ends = [""] if line.count == 1 else [f"-{k}" for k in range(1, line.count + 1)]
    path = Path(line.out or f"{name}.png")
    plan = []
    for job in jobs:
        stem = f"{path.stem}-{job.name}" if job.name else path.stem
        for k, end in enumerate(ends):
            file = folder / f"{stem}{end}{path.suffix}"
            plan.append(Planned(job, settings, settings.seed + k, file, number))
    return plan


def settle(options: argparse.Namespace, old: Recipe | ForeignRecipe | None) -> Settings:
    """Every setting: the option that is given, else the recipe's, else the default.

    Raises:
        ValueError: a count or a size that is none, a number type beside a level that has its own.
    """
    if options.count < 1:
        raise ValueError(f"--count is {options.count}; it must be 1 or more")
    own = old if isinstance(old, Recipe) else None

    def first(given: Any, name: str, default: Any = None) -> Any:
        found = given if given is not None else getattr(old, name, None)
        return default if found is None else found

    size = parse_size(options.size) if options.size else None
    if size is None and old is not None and old.width and old.height:
        size = old.width, old.height
    level = level_of(options, getattr(old, "optimize", None))
    was_halved = own is not None and own.optimize in HALVED  # its number type was the level's choice, not the user's
    return Settings(
        model=options.model or (own.model if own else "default"),
        negative_prompt=first(options.negative_prompt, "negative_prompt"),
        steps=first(options.steps, "steps"),
        guidance_scale=first(options.guidance_scale, "guidance_scale"),
        seed=first(options.seed, "seed", int.from_bytes(os.urandom(4), "little")),
        size=size,
        strength=first(options.strength, "strength"),
        fit=first(options.fit, "fit", "cover"),
        dtype=options.dtype or "float32" if was_halved else first(options.dtype, "dtype", "float32"),
        device=first(options.device, "device"),
        scheduler=options.scheduler,
        optimize=level,
        engine=first(options.engine, "engine"),
        low_memory=first(options.low_memory, "low_memory", False),
        old=own,
        other_model=options.model is not None,
    )


def parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--size is {text!r}; it must be WIDTHxHEIGHT, for example 1024x768")
    return int(parts[0]), int(parts[1])


def files_read(options: argparse.Namespace, plan: list[Planned]) -> list[Path]:
    """Files that are read."""
    given = [Path(ref.path) for each in plan for ref in each.job.files]
    return given + [Path(own) for own in (options.again, options.jobs) if own]


def _files(options: argparse.Namespace, jobs: list[Job], given: list[Path]) -> list[Path]:
    """A file for each picture; none of those `given`."""
    ends = [""] if options.count == 1 else [str(k) for k in range(1, options.count + 1)]
    if not jobs[0].name:
        return output_files(options.out, ends, taken=given)
    folder = output_folder(options.out)
    files: list[Path] = []
    for job in jobs:
        files += free_files(folder / f"{job.name}.png", ends, files)
    return writable(files)
