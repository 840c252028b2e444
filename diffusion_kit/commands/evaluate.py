"""`diffusion-kit evaluate`: how faithfully a control is followed, as a table, as JSON and as a page."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_kit.making.job import Settings

from .console import note
from .detect import images_of, parse_options
from .execution import add_execution, level_of
from .outputs import writable
from .remembering import add_history, remembering

MAP, CAPTION, PHOTO = "image", "caption", "photo"  # columns of a JSONL file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="default",
        help="'default' or 'default-kandinsky' (embedded), a folder, a .safetensors file or a hub id",
    )
    add(
        "--control",
        required=True,
        metavar="NAME[=PATH]",
        help="a control that comes with the model (canny); or a name of yours, and its folder, file or hub id",
    )
    add(
        "--conditions",
        required=True,
        metavar="PATH",
        help="a folder of control images with captions of the same name in .txt; or a JSONL file with the columns "
        f"{MAP}, {CAPTION} and, if you have it, {PHOTO}",
    )
    add("--photos", action="store_true", help="the images are photos: the detector makes the control images")
    add("--detector", metavar="NAME", help="by default the control's name")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the detector's own; repeatable")
    add("--detect-resolution", type=int, metavar="PIXELS", help="shorter side that the detector sees")
    add("--invert", action="store_true", help="the control takes black for white")
    add("--scales", default="1", metavar="S,S..", help="of the control; without it is always measured")
    add("--neutral", action="store_true", help="measure the control, given an empty picture, too")
    add("--control-guidance", type=float, metavar="G", help="measure the control with this guidance of its own, too")
    add("--seeds", type=int, default=4, help="pictures for each condition and scale")
    add("--seed", type=int, default=0, help="the first one")
    add("--steps", type=int, help="by default what the model's card says, else 20")
    add("--guidance", type=float, help="by default what the model's card says, else 7.5")
    add("--batch", type=int, default=8, help="pictures made at once")
    add("--inception", metavar="FILE", help="weights for FID and KID")
    add("--clip", metavar="FOLDER", help="model for the CLIP score")
    add("--lpips", metavar="FILE", help="torchvision's AlexNet, for LPIPS")
    add("--out", default="evaluation", metavar="FOLDER", help="of the page and the report; it must not be there yet")
    add("--json", action="store_true", help="print JSON in place of the table")
    add_execution(parser)
    add_history(parser)


def run(options: argparse.Namespace) -> None:
    """Checks what can be checked, then loads, makes, measures and writes."""
    out, scales = Path(options.out), parse_scales(options.scales)
    if out.exists():
        raise ValueError(f"--out {out} is there already: give another name")
    writable([out])
    if not 0 <= options.seed <= 2**63 - 1:
        raise ValueError(f"--seed is {options.seed}; it must be 0 or more, and below 2^63")
    name, _, path = options.control.partition("=")
    cases, loading = read_conditions(Path(options.conditions), photos=options.photos), _settings(options)

    from transformers.utils import logging

    from diffusion_kit.adapters.control import Control, shown_as
    from diffusion_kit.adapters.detectors import detector
    from diffusion_kit.adapters.maps import detector_of
    from diffusion_kit.evaluation import Condition, evaluate, quality_measures
    from diffusion_kit.evaluation.measures import measures_of
    from diffusion_kit.making.loading import check_execution, load_pipeline

    check_execution(loading)
    kind = options.detector or detector_of(name) or name
    measures_of(kind)
    settings = parse_options(detector(kind), kind, options.option) | ({"invert": True} if options.invert else {})
    settings |= {} if options.detect_resolution is None else {"detect_resolution": options.detect_resolution}
    if not options.debug:
        logging.disable_progress_bar()
    quality = quality_measures(inception=options.inception, clip=options.clip, lpips=options.lpips)
    pipe = load_pipeline(loading, note, debug=options.debug)
    pipe.set_progress_bar_config(disable=True)
    net = pipe.load_control(str(Path(path).absolute()) if path and Path(path).exists() else path or name)
    report = evaluate(
        pipe,
        lambda images, scale: [Control(net, shown_as(net, kind, images), scale=scale)],
        [Condition(**case) for case in cases],
        detector=kind,
        settings=settings,
        scales=scales,
        seeds=options.seeds,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        batch=options.batch,
        dropped=options.neutral,
        control_guidance=options.control_guidance,
        quality=quality,
    )
    about = {"model": options.model, "control": options.control}
    about |= {"optimize": loading.optimize, "engine": pipe.engine.name} if loading.optimize else {}
    report = replace(report, about={**about, **report.about})
    print(report.to_json().rstrip() if options.json else f"{report.table()}\n", flush=True)
    write(report, out)
    with remembering(options) as recorder:
        recorder.report(out)
    if not options.json:
        print(out / "index.html")


def parse_scales(text: str) -> list[float]:
    """
    Raises:
        ValueError: not finite numbers with commas between.
    """
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"--scales is {text!r}; it must be numbers with commas between, for example 0.5,1")
    return scales


def read_conditions(place: Path, *, photos: bool) -> list[dict[str, Any]]:
    """Name, prompt and pictures of each condition.

    Raises:
        FileNotFoundError: nothing there, or a caption is missing. ValueError: no pictures, a line that is none.
    """
    if place.is_dir():
        pairs = [(file, file.with_suffix(".txt")) for file in images_of([str(place)])]
        if lacking := next((text for _, text in pairs if not text.is_file()), None):
            raise FileNotFoundError(f"--conditions {place}: there is no {lacking.name}, the caption of an image")
        rows = [{MAP: file.name, CAPTION: _text(text).strip()} for file, text in pairs]
        folder = place
    elif place.is_file():
        rows, folder = _rows(place), place.parent
    else:
        raise FileNotFoundError(f"--conditions {place}: no such folder or file")
    role = "photo" if photos else "image"
    return [
        {"name": row[MAP], "prompt": row[CAPTION]}
        | ({PHOTO: folder / row[PHOTO]} if PHOTO in row else {})
        | {role: folder / row[MAP]}
        for row in rows
    ]


def write(report: Any, out: Path) -> None:
    """The folder, made beside its place and renamed: it is whole or not there."""
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        (beside / "report.json").write_text(report.to_json(), encoding="utf-8")
        report.page(beside)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _rows(file: Path) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key, ""), str) for key in (MAP, CAPTION, PHOTO)):
            raise ValueError(f"{file} line {number} is no JSON object with the texts {MAP!r} and {CAPTION!r}")
        if lacking := {MAP, CAPTION} - row.keys():
            raise ValueError(f"{file} line {number} has no {', '.join(sorted(lacking))}")
        rows.append(row)
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text file in UTF-8") from None


def _settings(options: argparse.Namespace) -> Settings:
    """What loading a model needs to know."""
    given = dict.fromkeys(("negative_prompt", "guidance_scale", "size", "strength", "scheduler", "old"))
    same = {"model": options.model, "device": options.device, "dtype": options.dtype or "float32", "seed": options.seed}
    same |= {"optimize": level_of(options), "engine": options.engine, "low_memory": bool(options.low_memory)}
    return Settings(**given, **same, steps=1, fit="cover", other_model=True)  # type: ignore[arg-type]
