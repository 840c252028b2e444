"""What executes the networks: the options of every command that makes pictures."""

from __future__ import annotations

import argparse

from diffusion_kit.making.job import DTYPES, HALVED


def add_execution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1, mps; by default cuda where there is one")
    add("--dtype", choices=DTYPES, help="by default float32")
    add(
        "--optimize",
        metavar="LEVEL",
        help="exact: the same picture faster; half: in half precision; fast: half and approximations",
    )
    add(
        "--engine", metavar="NAME", help="what executes the networks; by default what a short measurement finds fastest"
    )
    add(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="networks are in memory while they run only, as far as that goes",
    )


def level_of(options: argparse.Namespace, recorded: str | None = None) -> str | None:
    """The level of --optimize: as given, else the recorded one, else what other options ask for.

    Raises:
        ValueError: a number type beside a level that has its own.
    """
    level = options.optimize or recorded or ("exact" if options.engine or options.low_memory else None)
    if level in HALVED and options.dtype is not None:
        raise ValueError(f"--optimize {level} computes in half precision: leave out --dtype, or give --optimize exact")
    return level
