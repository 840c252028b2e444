"""`diffusion-kit cache`: makes latents, text embeddings and conditions before a training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import workers
from .console import note, show_warnings

if TYPE_CHECKING:
    from diffusion_kit.training.config import Config

SHARES = 16  # of the pictures, for each worker: what its death costs at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the training's configuration, with cache.folder")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="put over it: cache.folder=cache")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="only the K-th of N shares, for several processes")
    workers.add_arguments(parser, "the pictures")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.training.config import read

    workers.check(options)
    config, part = read(options.config, options.overrides), parse_part(options.part)
    if config.cache.folder is None:
        raise ValueError("cache.folder is not set: add cache.folder=FOLDER")
    from diffusion_kit.training.train import build_cache

    if options.on is None:
        build_cache(config, part, print)
    elif part != (0, 1):
        raise ValueError("--part and --on ray do not go together: its workers share all pictures")
    else:
        on_workers(config, options)


@dataclass(frozen=True)
class Filled:
    """A share: how many views were made, what was said, and the stores' folders."""

    made: int
    said: tuple[str, ...]
    folders: tuple[str, ...]


def ready(config: Config, debug: bool) -> Callable[[tuple[int, int]], Filled]:
    """Loads base and data in a worker, and gives what fills a share there."""
    from diffusion_kit.training.train import make_filler

    show_warnings(debug)
    said: list[str] = []
    filler = make_filler(config, said.append)

    def task(part: tuple[int, int]) -> Filled:
        made = filler.fill(part)
        own = tuple(said)
        said.clear()
        return Filled(made, own, tuple(str(store.folder) for store in filler.stores))

    return task


def on_workers(config: Config, options: argparse.Namespace) -> None:
    """By workers of Ray; each task is a share, as (k, n)."""
    from tqdm import tqdm

    from diffusion_kit.training.data.store import Store
    from diffusion_kit.training.launching import machine
    from diffusion_kit.training.train import held

    number = SHARES * machine.processes(options.workers)
    parts = [(k, number) for k in range(number)]
    answers = workers.shared(parts, partial(ready, config, options.debug), options.workers, gpu=True)
    filled, failures = list[Filled](), list[workers.Failed]()
    said: dict[str, None] = {}
    for part, found in zip(parts, tqdm(answers, total=number, desc="cache", unit="share", disable=None), strict=True):
        if isinstance(found, workers.Failed):
            note(f"share {part[0] + 1} of {number}: {found.problem}")
            failures.append(found)
        else:
            filled.append(found)
            said |= dict.fromkeys(found.said)  # what every worker says, once
    folders = dict.fromkeys(folder for found in filled for folder in found.folders)
    print(*said, sep="\n", end="\n" if said else "")
    if folders:
        print(held(sum(found.made for found in filled), [Store(Path(folder)) for folder in folders]))
    if failures:
        raise SystemExit(workers.code_of(failures))


def parse_part(text: str) -> tuple[int, int]:
    """(share counted from 0, number of shares).

    Raises:
        ValueError: it is none.
    """
    share, _, number = text.partition("/")
    if not (share.isdigit() and number.isdigit() and 1 <= int(share) <= int(number)):
        raise ValueError(f"--part is {text!r}; it must be K/N with 1 <= K <= N, for example 2/4")
    return int(share) - 1, int(number)
