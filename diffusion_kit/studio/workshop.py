"""The loaded model, and what it makes. Only the queue's thread is in here: there is one model, and it is swapped."""

from __future__ import annotations

import gc
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_kit.adapters.control import kind_of
from diffusion_kit.adapters.detectors import detect, detector
from diffusion_kit.adapters.maps import detector_of
from diffusion_kit.adapters.pictures import eight_bit, load_image
from diffusion_kit.evaluation.measures import MEASURES
from diffusion_kit.ledger import Recorder, pictures
from diffusion_kit.making import loading
from diffusion_kit.making.check import check
from diffusion_kit.making.fingerprint import fingerprint
from diffusion_kit.making.job import Settings, without_auto
from diffusion_kit.making.pictures import Made, as_seen, complete, make, make_control
from diffusion_kit.recipes import Recipe, save

from . import words
from .config import StudioConfig
from .library import Library
from .queue import Job
from .requests import Asked, DetectRequest

KIT = Path(__file__).parents[1]
GLANCE = 0.2  # seconds between two previews


@dataclass(frozen=True)
class Result:
    """A picture that was made.

    Attributes:
        file: with the recipe in it.
        shown: files of the control images, as the networks saw them.
        fidelity: how the controls were followed, name and figure, where a measure belongs to a control's detector.
        command, python: what makes the same pixels.
        told: what the kit warned of, as of a prompt that was cut.
    """

    file: Path
    recipe: Recipe
    shown: tuple[Path, ...]
    fidelity: tuple[tuple[str, float], ...]
    seconds: float
    command: str
    python: str
    told: tuple[str, ...]


class Workshop:
    """
    Args:
        recorder: writes pictures to the ledger.
    """

    def __init__(self, config: StudioConfig, library: Library, recorder: Recorder) -> None:
        self.config, self.library, self.recorder = config, library, recorder
        self.pipe: Any = None
        self.model: str | None = None  # that is loaded
        self.own: Any = None  # its own scheduler
        self.hashes: dict[str, str] = {}

    def hash_of(self, source: Any) -> str:
        """Of a model's or a control's files as they were when they were loaded."""
        if (key := str(source)) not in self.hashes:
            self.hashes[key] = fingerprint(source)
        return self.hashes[key]

    def load(self, settings: Settings) -> Any:
        """The pipeline of the model that settings name, with their scheduler. Another model is let go of first."""
        if settings.model != self.model:
            self.release()
            self.pipe = loading.load_pipeline(replace(settings, scheduler=None), print)
            self.pipe.set_progress_bar_config(disable=True)
            self.model, self.own = settings.model, self.pipe.scheduler
        if settings.scheduler in (None, type(self.own).__name__):
            self.pipe.scheduler = self.own
        else:
            self.pipe.scheduler = loading.scheduler_named(settings.scheduler).from_config(self.own.config)
        return self.pipe

    def release(self) -> None:
        """Lets go of the model, its controls, and their memory."""
        self.pipe = self.model = self.own = None
        self.hashes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep_controls(self, kinds: set[str]) -> None:
        """Lets go of the controls that a picture does not use."""
        loaded: dict[str, Any] = self.pipe.__dict__.get("_base_controls", {})
        for kind in set(loaded) - kinds:
            del loaded[kind]
            self.hashes.pop(str(self.pipe.control_source(kind)), None)

    def recipe(self, asked: Asked) -> Recipe:
        """What is asked for as a whole recipe, by its model, which is then loaded.

        Raises:
            ValueError, FileNotFoundError: what cannot be made, in one line.
        """
        check(asked.job, asked.settings, asked.seed)
        pipe = self.load(asked.settings)
        named = tuple(
            replace(without_auto(own, [own.kind]), kind=self.library.control(own.kind, pipe.control_names))
            for own in asked.job.controls
        )
        self.keep_controls({own.kind for own in named})
        recipe = complete(pipe, replace(asked.job, controls=named), asked.settings, asked.seed, self.hash_of)
        if recipe.width * recipe.height > self.config.megapixels * 1e6:
            raise ValueError(
                f"the picture would have {recipe.width} x {recipe.height} pixels; this studio makes "
                f"{self.config.megapixels:g} megapixels at most: give a size"
            )
        return recipe

    def control_image(self, asked: Asked, number: int) -> Image.Image:
        """The image of one of the controls, from 0, as its network will see it: detected, and at the picture's size.

        Raises:
            ValueError, FileNotFoundError, ImportError: it cannot be made, in one line.
        """
        recipe = self.recipe(asked)
        return eight_bit(as_seen(make_control(self.pipe, recipe.controls[number], recipe), recipe))

    def make(self, asked: Asked, job: Job, source: str = pictures.STUDIO, *, measured: bool = False) -> Result:
        """Makes a picture, its file, and its row in the ledger.

        Raises:
            ValueError, FileNotFoundError: what cannot be made, in one line. Cancelled: the job was.
        """
        began = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            recipe, pipe = self.recipe(asked), self.pipe
            made = make(pipe, recipe, Teller(job), preview=job.watched)
        seconds = time.monotonic() - began
        file = save_free(self.config.pictures, made.picture, recipe)
        self.recorder.picture(file, recipe, source)
        by_type = {own.kind for own in recipe.controls if kind_of_is_by_type(pipe, own.kind)}
        shown = list[Path]()
        with suppress(OSError):  # the picture is there: a disk that is full now does not take it away
            shown += [save_shown(file, k, own) for k, own in enumerate(made.shown, 1)]
        return Result(
            file,
            recipe,
            tuple(shown),
            tuple(fidelity(recipe, made)) if measured else (),
            seconds,
            words.command(recipe),
            words.python(recipe, by_type),
            tuple(dict.fromkeys(str(own.message) for own in caught if Path(own.filename).is_relative_to(KIT))),
        )


class Teller:
    """Tells a job how far it is, and now and then shows what there is."""

    def __init__(self, job: Job) -> None:
        self.job, self.last = job, 0.0

    def __call__(self, done: int, of: int, preview: torch.Tensor | None) -> None:
        picture = None
        if preview is not None and time.monotonic() - self.last > GLANCE:
            values = (preview.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            picture, self.last = Image.fromarray(values), time.monotonic()
        self.job.step(done, of, picture)


def kind_of_is_by_type(pipe: Any, kind: str) -> bool:
    """Whether a control's network takes pictures by their types."""
    return getattr(kind_of(pipe.load_control(kind)), "BY_TYPE", False)


def save_free(folder: Path, picture: Image.Image, recipe: Recipe) -> Path:
    """Writes a picture under a free name."""
    file = free_file(folder, recipe.seed)
    try:
        save(picture, file, recipe)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def free_file(folder: Path, seed: int) -> Path:
    """FOLDER/2026-11-30/00001-SEED.png, with the next number of the day. The file is made, so that it is nobody else's."""
    folder = folder / f"{datetime.now():%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (file.name.partition("-")[0] for file in folder.glob("*-*.png"))
    number = max((int(own) for own in numbers if own.isdecimal()), default=0) + 1
    while True:
        file = folder / f"{number:05}-{seed}.png"
        try:
            file.touch(exist_ok=False)
        except FileExistsError:  # another studio was faster
            number += 1
        else:
            return file


def save_shown(file: Path, number: int, shown: Image.Image) -> Path:
    """Writes a control image beside its picture, in a folder of its own: it is no picture of the history."""
    beside = file.parent / "controls" / f"{file.stem}-{number}.png"
    beside.parent.mkdir(exist_ok=True)
    save(eight_bit(shown), beside)
    return beside


def fidelity(recipe: Recipe, made: Made) -> list[tuple[str, float]]:
    """The first measure of each control's detector, of the picture and of what the control was shown."""
    found = []
    for control, shown in zip(recipe.controls, made.shown, strict=True):
        name = (control.detect or control.type or detector_of(control.kind) or "").partition(":")[0]
        if name not in MEASURES:
            continue
        measure = MEASURES[name][0]
        try:
            comparison = measure.compare(detect(name, made.picture), shown)
        except (ValueError, FileNotFoundError, ImportError):  # nobody in the picture, or no weights
            continue
        found.append((measure.name, float(measure.figure(np.array([[comparison]])))))
    return found


def make_control_image(request: DetectRequest, data: bytes, name: str = "image") -> Image.Image:
    """
    Raises:
        ValueError, FileNotFoundError, ImportError: no such detector, or its weights are missing, in one line.
    """
    detector(request.detector)
    sizes = {"detect_resolution": request.detect_resolution, "image_resolution": request.image_resolution}
    return detect(request.detector, load_image(data, name=name), invert=request.invert, **sizes)
