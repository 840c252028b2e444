"""From arguments to jobs: one for each picture, or for each name in folders of prompts and pictures."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_kit.making.job import AUTO, Job
from diffusion_kit.recipes import ControlRecipe, FileRef, Recipe

from .outputs import SUFFIXES

NUMBERS = ("scale", "start", "end", "guidance", "background")
OPTIONS = (*NUMBERS, "mode", "mask", "detect", "type")


def make_jobs(options: argparse.Namespace, old: Recipe | None, prompt: str | None) -> list[Job]:
    """The jobs of a call; what is not given comes from the recipe `old`.

    Raises:
        ValueError: what does not fit together, folders whose names do not pair. FileNotFoundError: no such file.
    """
    specs = [parse_control(text) for text in options.control]
    given: dict[str, str] = {}
    for label, value in (("--prompts", options.prompts), ("--image", options.image), ("--mask", options.mask)):
        given |= {label: value} if value else {}
    for k, spec in enumerate(specs):
        given[f"--control {k}"] = spec["image"]
    if options.prompts and options.prompt is not None:
        raise ValueError("give a PROMPT or --prompts, one of the two")
    if prompt is None and not options.prompts:
        raise ValueError("give a PROMPT, or --prompts FOLDER, or --again PICTURE")

    def ref(path: str) -> FileRef:
        return FileRef.of(path, embed=options.embed_controls)

    def kept(given: FileRef) -> FileRef:
        """A file of the old recipe, too, is in the new one where files are to be."""
        return replace(given, data=given.open()) if options.embed_controls else given

    def shown(control: ControlRecipe) -> ControlRecipe:
        return replace(control, image=kept(control.image), mask=control.mask and kept(control.mask))

    def job(name: str, texts: Mapping[str, str]) -> Job:
        image, mask = (old.image, old.mask) if old else (None, None)
        image = ref(texts["--image"]) if options.image else image
        mask = ref(texts["--mask"]) if options.mask else mask
        controls = tuple(_control(spec, texts[f"--control {k}"], ref) for k, spec in enumerate(specs))
        words = texts["--prompts"] if options.prompts else str(prompt)
        controls = controls or tuple(map(shown, old.controls if old else ()))
        return Job(name, words, image and kept(image), mask and kept(mask), controls)

    jobs = [job(name, texts) for name, texts in pair(given).items()]
    for each in jobs:
        if each.mask and not each.image:
            raise ValueError("--mask needs --image, the picture to repaint")
        if options.strength is not None and not each.image:
            raise ValueError("--strength needs --image")
    return jobs


def parse_control(text: str) -> dict[str, Any]:
    """KIND=IMAGE[,option=value...] -> kind, image and options.

    Raises:
        ValueError: another form, an unknown option, a number that is none.
    """
    head, *parts = re.split(rf",(?=(?:{'|'.join(OPTIONS)})=)", text)
    kind, _, image = head.partition("=")
    if not kind or not image:
        raise ValueError(f"--control {text!r} must be KIND=IMAGE[,{'=..,'.join(OPTIONS)}=..]")
    unknown = re.search(r",([a-z_]+)=[^,]*$", image)
    if unknown and not Path(image).exists():
        raise ValueError(f"--control has no option {unknown[1]!r}; there are {', '.join(OPTIONS)}")
    spec: dict[str, Any] = {"kind": kind, "image": image}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            spec[name] = _number(name, value) if name in NUMBERS else value
        except ValueError:
            raise ValueError(f"--control option {name}={value!r} must be a number") from None
    return spec


def _number(name: str, value: str) -> float | tuple[float, ...]:
    """A number; of a scale also one for each level, as 0.5:0.8:1:1."""
    return tuple(map(float, value.split(":"))) if name == "scale" and ":" in value else float(value)


def _control(spec: Mapping[str, Any], image: str, ref: Callable[[str], FileRef]) -> ControlRecipe:
    settings = {name: spec[name] for name in (*NUMBERS, "mode", "type") if name in spec}
    mask = ref(spec["mask"]) if "mask" in spec else None
    return ControlRecipe(spec["kind"], ref(image), detect=spec.get("detect", AUTO), mask=mask, **settings)


def pair(given: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Folders paired by the names of their files: name -> label -> path, or text of a prompt.

    What is no folder stands beside every name. `--prompts` is a folder of .txt files, or a text file with a prompt a line,
    whose names are the numbers of the lines.

    Raises:
        ValueError: names that one of the folders does not have.
    """
    several = {
        label: _files(label, path) for label, path in given.items() if label == "--prompts" or Path(path).is_dir()
    }
    names = sorted({name for files in several.values() for name in files}) or [""]
    for label, files in several.items():
        lacking = [name for name in names if name not in files]
        if lacking and files:
            others = next(path for other, path in given.items() if other in several and lacking[0] in several[other])
            raise ValueError(
                f"{given[label]} has no {', '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}, which {others} has: "
                "folders are paired by the names of their files"
            )
    return {name: {label: several.get(label, {}).get(name, path) for label, path in given.items()} for name in names}


def _files(label: str, path: str) -> dict[str, str]:
    """Name -> path of a picture, or text of a prompt."""
    place = Path(path)
    if label == "--prompts" and place.is_file():
        lines = [line.strip() for line in _text(place).splitlines() if line.strip()]
        found = {f"{k:0{len(str(len(lines)))}}": line for k, line in enumerate(lines, 1)}
    elif place.is_dir():
        suffixes = (".txt",) if label == "--prompts" else SUFFIXES
        files = [file for file in sorted(place.iterdir()) if file.suffix.lower() in suffixes and file.is_file()]
        found = {file.stem: _text(file).strip() if label == "--prompts" else str(file) for file in files}
        if len(found) < len(files):
            raise ValueError(f"{path} has two files of one name and different endings")
    else:
        raise ValueError(f"--prompts {path}: no such folder or text file")
    if not found:
        raise ValueError(f"{path} has no {'prompts' if label == '--prompts' else 'pictures'}")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text file in UTF-8") from None
