"""Job files of `diffusion-kit generate`: a JSON object a line, the options of its pictures; and which are made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusion_kit.recipes import Recipe, read

from .outputs import SUFFIXES

TEXT, NUMBER, WHOLE = (str,), (int, float), (int,)
KEYS: dict[str, tuple[type, ...]] = {
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "control": (str, list),
    "image": TEXT,
    "strength": NUMBER,
    "mask": TEXT,
    "fit": TEXT,
    "steps": WHOLE,
    "guidance_scale": NUMBER,
    "seed": WHOLE,
    "size": TEXT,
    "count": WHOLE,
    "out": TEXT,
}
FORMS = {str: "text", int: "a whole number", float: "a number", list: "a list of texts"}


def read_lines(options: argparse.Namespace) -> dict[int, argparse.Namespace]:
    """The options of each line, by its number: its own, and for what it does not say those of the command.

    Raises:
        FileNotFoundError: no such file. ValueError: options that do not go with a job file, or what a line has wrong.
    """
    for name in ("again", "prompts", "grid"):
        if getattr(options, name):
            raise ValueError(f"--jobs and --{name} do not go together")
    file = Path(options.jobs)
    if not file.is_file():
        raise FileNotFoundError(f"no job file {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text file in UTF-8") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            with in_line(file, number):
                found[number] = _options(line, options)
    if not found:
        raise ValueError(f"{file} has no jobs")
    return found


@contextmanager
def in_line(file: str | Path | None, number: int | None) -> Iterator[None]:
    """Errors say in which line of the job file they are; None is no line of one."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if number is None:
            raise
        raise type(error)(f"{file}, line {number}: {error}") from None


def _options(line: str, options: argparse.Namespace) -> argparse.Namespace:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError('it must be an object, for example {"prompt": "a red fox", "seed": 1}')
    own = copy(options)
    own.out = None
    for key, value in values.items():
        setattr(own, key, _checked(key, value))
    return own


def _checked(key: str, value: Any) -> Any:
    if key not in KEYS:
        near = get_close_matches(key, KEYS, 1)
        raise ValueError(f"no key {key!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}"))
    if type(value) not in KEYS[key] or (type(value) is list and not all(isinstance(text, str) for text in value)):
        forms = " or ".join(FORMS[kind] for kind in KEYS[key][-1:])
        raise ValueError(f"{key} is {json.dumps(value)}; it must be {forms}")
    if key == "out" and (Path(value).name != value or Path(value).suffix.lower() not in SUFFIXES):
        raise ValueError(f"out is {value!r}; it must be a file name that ends in .png, .jpg or .webp, without a folder")
    return [value] if key == "control" and isinstance(value, str) else value


def is_made(file: Path, recipe: Recipe) -> bool:
    """Whether the file is the picture of this recipe; engine, device, use of memory and versions may be others.

    Raises:
        ValueError: it is something else.
    """
    if not file.exists():
        return False
    try:
        found = read(file)
    except ValueError:
        found = None
    if not isinstance(found, Recipe) or _what(found) != _what(recipe):
        raise ValueError(f"{file} is there and is not the picture of its job: move it away, or give another --out")
    return True


def _what(recipe: Recipe) -> Recipe:
    """What a recipe makes, in the types that a file gives it."""
    return replace(Recipe.from_json(recipe.to_json()), versions={}, device="", engine=None, low_memory=False)
