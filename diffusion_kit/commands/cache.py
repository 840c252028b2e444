"""`diffusion-kit cache`: makes latents, text embeddings and conditions before a training."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the training's configuration, with cache.folder")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="put over it: cache.folder=cache")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="only the K-th of N shares, for several processes")


def run(options: argparse.Namespace) -> None:
    from diffusion_kit.training.config import read

    config, part = read(options.config, options.overrides), parse_part(options.part)
    if config.cache.folder is None:
        raise ValueError("cache.folder is not set: add cache.folder=FOLDER")
    from diffusion_kit.training.train import build_cache

    build_cache(config, part, print)


def parse_part(text: str) -> tuple[int, int]:
    """(share counted from 0, number of shares).

    Raises:
        ValueError: it is none.
    """
    share, _, number = text.partition("/")
    if not (share.isdigit() and number.isdigit() and 1 <= int(share) <= int(number)):
        raise ValueError(f"--part is {text!r}; it must be K/N with 1 <= K <= N, for example 2/4")
    return int(share) - 1, int(number)
