"""`diffusion-kit bench`: the kit's levels and engines beside diffusers and other runtimes, on this machine."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path

from diffusion_kit.benchmark.cases import CONTROLS, DTYPES, WIDTHS, Case

from .outputs import writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--width", default="small", help="small, medium or large (SDXL itself), of random weights")
    add(
        "--controls",
        action="append",
        metavar="LIST",
        help="repeatable: plain, t2i_adapter, controlnet, or t2i_adapter,controlnet; by default plain",
    )
    add("--dtype", action="append", metavar="DTYPE", help="repeatable: float32 (the default), bfloat16, float16")
    add("--device", choices=("cpu", "cuda"), help="of the networks; by default cuda where there is one")
    add("--threads", action="append", type=int, metavar="N", help="repeatable; by default 1")
    add("--steps", type=int, default=4, help="of one timed run")
    add("--batch", action="append", type=int, metavar="N", help="repeatable: pictures of a run; by default 1")
    add("--side", action="append", type=int, metavar="N", help="repeatable: of the latents; by default 64")
    add("--rounds", type=int, default=7, help="of runs in turn")
    add(
        "--only",
        action="append",
        metavar="NAME",
        help="repeatable: a contender, or a word of its name; by default the quick",
    )
    add("--out", metavar="FILE", default="benchmark.json", help="results; cases that are in it are not run again")
    add("--page", metavar="FILE", help="a Markdown page of all results in --out")


def run(options: argparse.Namespace) -> None:
    for name in ("steps", "rounds", "threads", "batch", "side"):
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} is {number}; it must be 1 or more")
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is none here")
    cases = [replace(case, device=device) for case in cases_of(options)]
    files = [Path(file) for file in (options.out, options.page) if file]
    writable(files)
    from diffusion_kit.benchmark.contenders import SLOW, names_on
    from diffusion_kit.benchmark.interleaved import REFERENCE
    from diffusion_kit.benchmark.report import kept, measured, page

    known = names_on(device)
    words = options.only or [name for name in known if not name.endswith(SLOW)]
    for word in words:
        if not any(word in name for name in known):
            raise ValueError(f"--only is {word!r}; there are {', '.join(known)}")
    names = [name for name in known if name == REFERENCE or any(word in name for word in words)]
    measured(cases, names, files[0], options.rounds)
    if options.page:
        files[1].write_text(page(kept(files[0]), "diffusion-kit bench"))
        print(options.page)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Every combination of what was asked for.

    Raises:
        ValueError: a width, control or number type that there is not.
    """
    if options.width not in WIDTHS:
        raise ValueError(f"--width is {options.width!r}; it must be one of {', '.join(WIDTHS)}")
    mixtures = [tuple(name for name in text.split(",") if name != "plain") for text in options.controls or ["plain"]]
    for name in (name for controls in mixtures for name in controls):
        if name not in CONTROLS:
            raise ValueError(f"--controls has {name!r}; there are plain, {', '.join(CONTROLS)}")
    for dtype in options.dtype or ():
        if dtype not in DTYPES:
            raise ValueError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    several = (
        mixtures,
        options.dtype or ["float32"],
        options.threads or [1],
        options.batch or [1],
        options.side or [64],
    )
    return [
        Case(options.width, controls, dtype, threads, options.steps, batch, side)
        for controls, dtype, threads, batch, side in product(*several)
    ]
