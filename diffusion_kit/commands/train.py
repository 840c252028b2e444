"""`diffusion-kit train`: a training from its configuration."""

from __future__ import annotations

import argparse
import sys

from .remembering import add_history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration; `configs/` holds examples")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="put over it: data.resolution=512")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="resume although this key has another value"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="learn one batch, draw what the network sees, estimate memory and time; no run",
    )
    add_history(parser)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and do nothing")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.training.config import read

    config = read(options.config, [*options.overrides, *(["history=false"] if options.no_history else [])])
    if options.print_config:
        print(config.dump(), end="")
        return
    from diffusion_kit.training.train import check, train

    if options.check:
        if not check(config, print):
            raise RuntimeError("the network did not learn one batch")
        return
    command = ["diffusion-kit", *sys.argv[1:]]
    if train(config, resume=options.resume, allow=options.allow_change, command=command) is None:
        sys.exit(1)  # stopped before the end: what comes after it in a script must not run
