"""The `diffusion-kit` command."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BAD_INPUT, FAILURE = 2, 1
CONTROL_OPTIONS = ("scale", "start", "end", "mask", "detect")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for bad input; 1 for a failure. Errors are one line, with a traceback only under --debug."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return _complain(arguments, "interrupted", FAILURE)
    except (ValueError, TypeError, FileNotFoundError, PermissionError) as error:
        return _complain(arguments, str(error), BAD_INPUT)
    except Exception as error:
        return _complain(arguments, f"{type(error).__name__}: {error}", FAILURE)
    return 0


def _complain(arguments: argparse.Namespace, message: str, code: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"diffusion-kit: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffusion-kit", description="Pictures from diffusion models under control.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="make pictures from a prompt",
        description="Text-to-image; with --image image-to-image; with --mask too, inpainting. Controls work in all.",
    )
    add = generate.add_argument
    add("prompt", metavar="PROMPT")
    add("--model", default="default", help="'default' (embedded), a folder, a .safetensors file or a hub id")
    add("--negative-prompt", metavar="TEXT", help="what the picture should not be")
    add(
        "--control",
        action="append",
        default=[],
        metavar="KIND=IMAGE[,scale=..,start=..,end=..,mask=..,detect=..]",
        help="repeatable; KIND is a control that comes with the model (canny), or an adapter's folder, file or hub id; "
        "a named kind runs its own detector on IMAGE unless detect=none",
    )
    add("--image", metavar="FILE", help="picture to start from")
    add("--strength", type=float, help="share of the steps that --image leaves to the model, 0 to 1")
    add("--mask", metavar="FILE", help="greyscale; white is repainted")
    add("--steps", type=int, default=30)
    add("--guidance-scale", type=float, default=5.0)
    add("--seed", type=int, help="random, and printed, if not given")
    add("--size", metavar="WxH", help="by default the model's area in the shape of the first picture given")
    add("--count", type=int, default=1, help="pictures, with the seeds SEED, SEED + 1, ...")
    add("--out", metavar="FILE", help="PNG, JPEG or WEBP; with --count a number is added to the name")
    add("--scheduler", metavar="CLASS", help="a diffusers scheduler, for example EulerAncestralDiscreteScheduler")
    add("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--debug", action="store_true", help="show tracebacks and warnings")
    generate.set_defaults(run=generate_pictures)
    return parser


def generate_pictures(options: argparse.Namespace) -> None:
    """The `generate` command: checks what can be checked, then loads, makes and saves."""
    files = output_files(options.out, options.count)
    specs = [parse_control(text) for text in options.control]
    given = {name: _load(path) for name, path in (("image", options.image), ("mask", options.mask)) if path}
    if "mask" in given and "image" not in given:
        raise ValueError("--mask needs --image, the picture to repaint")
    if options.strength is not None and "image" not in given:
        raise ValueError("--strength needs --image")
    for spec in specs:
        spec["picture"] = _load(spec["image"])
    size = parse_size(options.size) if options.size else None

    pipe = load_pipeline(options)
    first = next((picture for picture in [given.get("image"), *(spec["picture"] for spec in specs)] if picture), None)
    width, height = size or natural_size(pipe, first)
    call: dict[str, Any] = {"width": width, "height": height}
    if given:
        call |= {"image": _fit(given["image"], width, height)}
        call |= {"mask_image": _fit(given["mask"], width, height)} if "mask" in given else {}
        call |= {"strength": options.strength} if options.strength is not None else {}
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
    images = pipe(
        options.prompt,
        negative_prompt=options.negative_prompt,
        controls=[make_control(pipe, spec, width, height) for spec in specs],
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=generators(seed, options.count),
        num_images_per_prompt=options.count,
        **call,
    ).images
    for file, picture, number in zip(files, images, range(options.count), strict=True):
        save(picture, file)
        print(f"{file}  {width} x {height}, seed {seed + number}")


def generators(seed: int, count: int) -> Any:
    import torch

    own = [torch.Generator("cpu").manual_seed(seed + k) for k in range(count)]
    return own if count > 1 else own[0]


def parse_control(text: str) -> dict[str, Any]:
    """KIND=IMAGE[,option=value...] -> kind, image and options.

    Raises:
        ValueError: another form, an unknown option, a number that is none.
    """
    head, *parts = re.split(rf",(?=(?:{'|'.join(CONTROL_OPTIONS)})=)", text)
    kind, _, image = head.partition("=")
    if not kind or not image:
        raise ValueError(f"--control {text!r} must be KIND=IMAGE[,{'=..,'.join(CONTROL_OPTIONS)}=..]")
    unknown = re.search(r",([a-z_]+)=[^,]*$", image)
    if unknown and not Path(image).exists():
        raise ValueError(f"--control has no option {unknown[1]!r}; there are {', '.join(CONTROL_OPTIONS)}")
    spec: dict[str, Any] = {"kind": kind, "image": image}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            spec[name] = float(value) if name in ("scale", "start", "end") else value
        except ValueError:
            raise ValueError(f"--control option {name}={value!r} must be a number") from None
    return spec


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise ValueError(f"--size is {text!r}; it must be WIDTHxHEIGHT, for example 1024x768")
    return int(match[1]), int(match[2])


def natural_size(pipe: Any, picture: Any) -> tuple[int, int]:
    """The model's own area in the shape of the picture, in multiples that its networks divide."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    if picture is None:
        return side, side
    multiple = 8 * max(1, side // 128)
    ratio = (picture.width / picture.height) ** 0.5
    width, height = (max(multiple, round(side * f / multiple) * multiple) for f in (ratio, 1 / ratio))
    return width, height


def load_pipeline(options: argparse.Namespace) -> Any:
    """The model on its device, quiet but for its progress bar."""
    import diffusers
    import torch
    import transformers

    from diffusion_kit import AutoPipelineForText2Image

    if not options.debug:
        warnings.simplefilter("ignore")
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {device!r} here; cpu always works") from None
    pipe = AutoPipelineForText2Image.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype))
    if options.scheduler:
        pipe.scheduler = _scheduler(options.scheduler).from_config(pipe.scheduler.config)
    return pipe.to(device)


def _scheduler(name: str) -> Any:
    import difflib

    import diffusers

    known = [other for other in dir(diffusers) if other.endswith("Scheduler") and not other.startswith("Flax")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.3)
        raise ValueError(f"no scheduler {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return getattr(diffusers, name)


def make_control(pipe: Any, spec: dict[str, Any], width: int, height: int) -> Any:
    """A `Control` from a parsed --control."""
    from diffusion_kit import Control, detect
    from diffusion_kit.adapters.detectors import detectors

    named = spec["kind"] in pipe.control_names
    picture = _fit(spec["picture"], width, height)
    detector = spec.get("detect", spec["kind"] if named and spec["kind"] in detectors() else "none")
    if detector != "none":
        picture = detect(detector, picture)
    numbers = {name: spec[name] for name in ("scale", "start", "end") if name in spec}
    mask = _fit(_load(spec["mask"]), width, height) if "mask" in spec else None
    return Control(pipe.load_control(spec["kind"]), picture, mask=mask, **numbers)


def _load(path: str) -> Any:
    from diffusion_kit import load_image

    return load_image(path)


def _fit(picture: Any, width: int, height: int) -> Any:
    """The picture scaled to cover the output and cut around its middle."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def output_files(out: str | None, count: int) -> list[Path]:
    """Files that can be written: the caller's, or names that are free.

    Raises:
        ValueError: no such folder, a format that is not written, a count below 1.
    """
    if count < 1:
        raise ValueError(f"--count is {count}; it must be 1 or more")
    path = Path(out) if out else _free(Path("picture.png"), count)
    if path.is_dir():
        path = _free(path / "picture.png", count)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {path} must end in .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: the folder {path.parent} cannot be written to")
    return _numbered(path, count)


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def _free(path: Path, count: int) -> Path:
    """The path, or with the first letter behind its name under which no file stands yet."""
    attempt, number = path, 1
    while any(file.exists() for file in [attempt, *_numbered(attempt, count)]):
        number += 1
        attempt = path.with_stem(f"{path.stem}_{number}")
    return attempt


def save(picture: Any, path: Path) -> None:
    """Writes beside and renames: a file is whole or not there."""
    beside = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        picture.save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
