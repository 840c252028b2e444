"""Recipes: what a picture was made from, kept inside its own file, so that it can be made again.

Imports nothing of the models: reading a recipe costs no more than opening the picture.
"""

from .files import check, read, save
from .foreign import ForeignRecipe
from .recipe import ControlRecipe, FileRef, Recipe

__all__ = ["ControlRecipe", "FileRef", "ForeignRecipe", "Recipe", "check", "read", "save"]
