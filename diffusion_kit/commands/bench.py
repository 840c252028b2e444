"""`diffusion-kit bench`: the kit's levels and engines beside diffusers and other runtimes, on this machine."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--width", default="small", help="small, medium or large (SDXL itself), of random weights")
    add(
        "--controls",
        action="append",
        metavar="LIST",
        help="repeatable: plain, t2i_adapter, controlnet, or t2i_adapter,controlnet; by default plain",
    )
    add("--dtype", action="append", metavar="DTYPE", help="repeatable: float32 (the default), bfloat16")
    add("--threads", action="append", type=int, metavar="N", help="repeatable; by default 1")
    add("--steps", type=int, default=4, help="of one timed run")
    add("--batch", action="append", type=int, metavar="N", help="repeatable: pictures of a run; by default 1")
    add("--side", action="append", type=int, metavar="N", help="repeatable: of the latents; by default 64")
    add("--rounds", type=int, default=7, help="of runs in turn")
    add("--only", action="append", metavar="NAME", help="repeatable: a contender, or a word that its name has")
    add("--out", metavar="FILE", default="benchmark.json", help="results; cases that are in it are not run again")
    add("--page", metavar="FILE", help="a Markdown page of all results in --out")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.benchmark.cases import CONTROLS, WIDTHS, Case

    if options.width not in WIDTHS:
        raise ValueError(f"--width is {options.width!r}; it must be one of {', '.join(WIDTHS)}")
    cases = []
    for text in options.controls or ["plain"]:
        controls = tuple(name for name in text.split(",") if name != "plain")
        if unknown := [name for name in controls if name not in CONTROLS]:
            raise ValueError(f"--controls has {unknown[0]!r}; there are plain, {', '.join(CONTROLS)}")
        for dtype in options.dtype or ["float32"]:
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f"--dtype is {dtype!r}; it must be float32 or bfloat16")
            for threads in options.threads or [1]:
                for batch in options.batch or [1]:
                    for side in options.side or [64]:
                        cases.append(Case(options.width, controls, dtype, threads, options.steps, batch, side))
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    results = measured(cases, options)
    if options.page:
        from diffusion_kit.benchmark.report import machine, page

        Path(options.page).write_text(page(machine(), results, "diffusion-kit bench", "here"))
        print(options.page)


def measured(cases: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of all cases, kept after each."""
    import torch

    from diffusion_kit.benchmark.cases import model_folder
    from diffusion_kit.benchmark.contenders import CONTENDERS
    from diffusion_kit.benchmark.interleaved import compare, machine_peak
    from diffusion_kit.benchmark.report import lines_of, summary

    names = [name for name in CONTENDERS if not options.only or any(word in name for word in options.only)]
    out = Path(options.out)
    results = json.loads(out.read_text()) if out.is_file() else []
    with tempfile.TemporaryDirectory() as root:
        for case in cases:
            known = next((own for own in results if own["case"] == case.to_json()), None)
            if known is None:
                rows = compare(case, names, model_folder(case.width, Path(root)), options.rounds)
                known = summary(case, rows, machine_peak(getattr(torch, case.dtype), case.threads))
                results.append(known)
                out.write_text(json.dumps(results, indent=1) + "\n")
            print("\n".join(lines_of(known)), flush=True)
    return results
