"""A share of planned pictures: what one process, a worker, or one of several processes does with a loaded model."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.ledger import Recorder
from diffusion_kit.making import loading, pictures
from diffusion_kit.making.fingerprint import fingerprint
from diffusion_kit.making.job import Settings
from diffusion_kit.recipes import Recipe, check, read

from .console import kept_notes, note, show_warnings
from .job_file import in_line, is_made
from .outputs import saved
from .plan import Planned
from .workers import Failed


@dataclass(frozen=True)
class Outcome:
    """What became of a planned picture.

    Attributes:
        told: the line about it.
        notes: what was said while it was made.
    """

    told: str = ""
    failed: Failed | None = None
    notes: tuple[str, ...] = ()


class Maker:
    """A loaded model that makes planned pictures.

    Args:
        file: the job file, if they are of one.
        taken: files that are spoken for.
    """

    def __init__(self, pipe: Any, file: str | None, taken: Collection[Path] = ()) -> None:
        self.pipe, self.file, self.taken, self.hash_of = pipe, file, taken, cache(fingerprint)

    def recipe(self, each: Planned) -> tuple[Recipe, bool]:
        """The whole recipe, and whether its picture is there.

        Raises:
            ValueError, FileNotFoundError: it cannot be made, or its file is something else.
        """
        with in_line(self.file, each.line):
            recipe = pictures.complete(self.pipe, each.job, each.settings, each.seed, self.hash_of)
            check(each.file, recipe)
            return recipe, each.line is not None and is_made(each.file, recipe)

    def make(self, each: Planned, recipe: Recipe) -> tuple[Image.Image, Path]:
        """The picture, and its file."""
        with in_line(self.file, each.line):
            picture = pictures.make_picture(self.pipe, recipe)
            return picture, saved(picture, each.file, recipe, chosen=each.chosen, taken=self.taken)

    def outcome(self, each: Planned) -> Outcome:
        """Makes a picture, unless it is there. That it cannot be made does not stop the others of its share."""
        with kept_notes() as notes:
            try:
                recipe, is_there = self.recipe(each)
                if not is_there:
                    self.make(each, recipe)
                return Outcome(told(each.file, recipe), notes=tuple(notes))
            except Exception as error:
                return Outcome(failed=Failed.by(error), notes=tuple(notes))


def told(file: Path, recipe: Recipe) -> str:
    return f"{file}  {recipe.width} x {recipe.height}, seed {recipe.seed}"


def ready(settings: Settings, file: str, debug: bool) -> Callable[[Planned], Outcome]:
    """Loads the model in a worker, and gives what makes a picture there."""
    show_warnings(debug)
    with kept_notes() as notes:
        pipe = loading.load_pipeline(settings, note, debug=debug)
    pipe.set_progress_bar_config(disable=True)
    shared = ExitStack()
    shared.enter_context(pipe.sharing())
    atexit.register(shared.close)  # for the worker's life
    maker = Maker(pipe, file)

    def task(each: Planned) -> Outcome:
        found = maker.outcome(each)
        own = (*notes, *found.notes)
        notes.clear()
        return replace(found, notes=own)

    return task


class Report:
    """Tells of pictures that several share what is told of those that one makes.

    Args:
        file: the job file.
        before: pictures that were there.
        recorder: writes them to the history.
    """

    def __init__(self, file: str, before: Collection[Path], recorder: Recorder) -> None:
        self.file, self.before, self.recorder = file, before, recorder
        self.there, self.failures = 0, list[Failed]()
        self.noted: set[str] = set()

    def add(self, each: Planned, found: Outcome | Failed) -> None:
        found = found if isinstance(found, Outcome) else Outcome(failed=found)
        for text in found.notes:
            if text not in self.noted:  # every worker says it
                note(text)
            self.noted.add(text)
        if found.failed is not None:
            place, problem = f"{self.file}, line {each.line}: ", found.failed.problem
            note(problem if problem.startswith(place) else place + problem)  # unforeseen ones do not say it
            self.failures.append(found.failed)
        elif each.file in self.before:
            self.there += 1
        else:
            print(found.told, flush=True)
            if isinstance(recipe := read(each.file), Recipe):
                self.recorder.picture(each.file, recipe)
