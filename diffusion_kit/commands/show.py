"""`diffusion-kit show`: the recipe that a picture carries."""

from __future__ import annotations

import argparse

from diffusion_kit.recipes import ForeignRecipe, Recipe, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "picture", metavar="PICTURE", help="PNG, WEBP or JPEG of diffusion-kit, AUTOMATIC1111 or ComfyUI"
    )
    parser.add_argument("--json", action="store_true", help="our own recipe as it stands in the file")


def run(options: argparse.Namespace) -> None:
    recipe = read(options.picture)
    if options.json and isinstance(recipe, ForeignRecipe):
        raise ValueError(f"{options.picture} was made by {recipe.software}: --json shows recipes of diffusion-kit only")
    print(recipe.to_json() if options.json and isinstance(recipe, Recipe) else recipe.describe())
