"""`diffusion-kit detect`: control images of photos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import note
from .outputs import SUFFIXES, free_files, is_chosen, output_files, output_folder, saved, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="of the detector: see --list")
    add("images", metavar="IMAGE", nargs="*", help="image files, or folders of them")
    add("-o", "--out", metavar="FILE", help="PNG, JPEG or WEBP; of several images a folder")
    add("--list", action="store_true", help="what detectors there are, and which can run now")
    add("--model", help="of detectors with a network: a folder, a .safetensors file or a hub id")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the detector's own; repeatable")
    add("--detect-resolution", type=int, metavar="PIXELS", help="shorter side at which the detector looks")
    add("--resolution", type=int, metavar="PIXELS", help="shorter side of the result; by default the photo's")
    add("--invert", action="store_true", help="black for white")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.adapters.detectors import check_options, detector

    if options.list:
        print(listing())
        return
    if not options.name or not options.images:
        raise ValueError("give the NAME of a detector and an IMAGE: diffusion-kit detect canny photo.jpg; or --list")
    module = detector(options.name)
    more = parse_options(module, options.name, options.option) | ({"model": options.model} if options.model else {})
    check_options(options.name, module, more)
    more |= {"detect_resolution": options.detect_resolution, "image_resolution": options.resolution}
    more |= {"invert": options.invert}
    files = images_of(options.images)
    outs = _outs(options, files)
    chosen = len(files) > 1 or is_chosen(options.out)
    if len(files) == 1:
        print(_detect_one(options.name, files[0], outs[0], more, chosen=chosen))
    else:
        _detect_many(options.name, files, outs, more)


def _detect_one(name: str, file: Path, out: Path, more: dict[str, Any], *, chosen: bool) -> str:
    """Which file it made."""
    from diffusion_kit.adapters.detectors import detect
    from diffusion_kit.adapters.pictures import eight_bit

    picture = detect(name, file, **more)
    own = picture if out.suffix.lower() == ".png" else eight_bit(picture)  # only PNG has 16 bits
    return f"{saved(own, out, chosen=chosen)}  {own.width} x {own.height}"


def _detect_many(name: str, files: Sequence[Path], outs: Sequence[Path], more: dict[str, Any]) -> None:
    """Goes on where a picture is broken: those after it are still worth having."""
    from tqdm import tqdm

    failed = 0
    for file, out in tqdm(list(zip(files, outs, strict=True)), unit="image"):
        try:
            _detect_one(name, file, out, more, chosen=True)
        except ValueError as error:
            failed += 1
            note(str(error))
    print(f"{len(files) - failed} control images in {outs[0].parent}")
    if failed:
        raise ValueError(f"{failed} of {len(files)} images failed")


def parse_options(module: Any, name: str, given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE in the type of the option's default.

    Raises:
        ValueError: another form, or a value of another type. TypeError: no such option.
    """
    from diffusion_kit.adapters.detectors import check_options, options_of

    pairs = [text.partition("=") for text in given]
    for option, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--option {option!r} must be NAME=VALUE")
    check_options(name, module, {option: value for option, _, value in pairs})
    known = options_of(module)
    if shared := next((option for option, _, _ in pairs if option not in known), None):
        own = ", ".join(known) or "none"
        raise ValueError(f"--option {shared}: only options of the detector's own are given so; {name!r} has {own}")
    return {option: _typed(option, value, known[option].default) for option, _, value in pairs}


def _typed(option: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--option {option}={value!r} must be true or false")
        return value.lower() in ("true", "1")
    if not isinstance(default, (int, float)):
        return value
    try:
        return int(value) if isinstance(default, int) and value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"--option {option}={value!r} must be a number") from None


def images_of(given: Sequence[str]) -> list[Path]:
    """The image files of folders, and files as they are.

    Raises:
        ValueError: a folder without images. FileNotFoundError: nothing there.
    """
    files: list[Path] = []
    for place in map(Path, given):
        if not place.exists():
            raise FileNotFoundError(f"no image file {place}")
        inside = sorted(f for f in place.iterdir() if f.suffix.lower() in SUFFIXES) if place.is_dir() else [place]
        if not inside:
            raise ValueError(f"{place} has no pictures ({', '.join(SUFFIXES)})")
        files += inside
    return files


def _outs(options: argparse.Namespace, files: Sequence[Path]) -> list[Path]:
    if len(files) == 1 and not Path(options.images[0]).is_dir():
        return output_files(options.out, [""], stem=f"{files[0].stem}-{options.name}", taken=files)
    folder = output_folder(options.out or options.name)
    outs: list[Path] = []
    for file in files:
        outs += free_files(folder / f"{file.stem}.png", [""], outs)
    return writable(outs)


def listing() -> str:
    """A line for each detector: what it gives, and what it needs where it cannot run."""
    from diffusion_kit.adapters.detectors import detector, detectors, missing

    width = max(map(len, detectors()))
    lines = []
    for name in detectors():
        lack = missing(name)
        says = (detector(name).__doc__ or "").strip().split("\n")[0]
        lines.append(f"{name:{width}}  {'ready' if lack is None else '-    '}  {lack or says}")
    return "\n".join(lines)
