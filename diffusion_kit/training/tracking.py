"""Who is told of a run beside its metrics.jsonl: the ledger, and trackers that were asked for, by accelerate's interface.

None of them stops a run: what a tracker cannot take is said once.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from diffusion_kit.ledger import Recorder, evaluations, pictures, runs
from diffusion_kit.ledger.folders import new_run
from diffusion_kit.ledger.recorder import summary

from . import run
from .config import Config
from .loop import Trainer
from .tree import leaves

PROJECT = "diffusion_kit"


class LedgerTracker(GeneralTracker):
    """Writes a run into the ledger.

    Args:
        row: of the run, as `ledger.runs.begin` takes it.
    """

    name = "ledger"
    requires_logging_directory = False

    def __init__(self, row: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__()
        self.row, self.recorder = row, Recorder(say)

    @property
    def tracker(self) -> Recorder:
        return self.recorder

    def start(self) -> None:
        row = dict(self.row)
        self.recorder.place(Path(row["folder"]))
        self.recorder(lambda session: runs.begin(session, row))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """It is in the run's row."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.row["step"] = step
        row = dict(self.row)
        self.recorder(lambda session: runs.log(session, row, values))

    def sheets(self, folder: Path, step: int) -> None:
        """What a validation wrote: a sheet and a report of each group."""
        own, config = self.row["id"], self.row["config"]
        for file in sorted(folder.glob("*.png")):
            row = pictures.sheet(file, config, own, step)
            self.recorder(lambda session, file=file, row=row: pictures.add_sheet(session, file, row))
        for file in sorted(folder.glob(f"*/{evaluations.REPORT}")):
            self.recorder(lambda session, file=file: evaluations.add_file(session, file, run=own, step=step))

    def ended(self, state: str) -> None:
        self.recorder(lambda session: runs.end(session, self.row["id"], state))

    def finish(self) -> None:
        self.recorder.close()


class Trackers:
    """All trackers of a run, which take its lines and its validations."""

    def __init__(self, own: Sequence[GeneralTracker], say: Callable[[str], None]) -> None:
        self.own, self.say, self.failed = list(own), say, set[str]()

    def log(self, row: dict[str, Any]) -> None:
        values = dict(runs.numbers({name: value for name, value in row.items() if name != "step"}))
        self.each(lambda tracker: tracker.log(values, step=row["step"]))

    def validated(self, folder: Path, step: int) -> None:
        sheets = {f"validation/{file.stem}": _array(file) for file in sorted(folder.glob("*.png"))}

        def tell(tracker: Any) -> None:
            if isinstance(tracker, LedgerTracker):
                tracker.sheets(folder, step)
            elif hasattr(tracker, "log_images") and sheets:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(sheets, step=step, **layout)

        self.each(tell)

    def ended(self, state: str) -> None:
        for tracker in self.own:
            if isinstance(tracker, LedgerTracker):
                tracker.ended(state)
        self.each(lambda tracker: tracker.finish())

    def each(self, does: Callable[[Any], None]) -> None:
        for tracker in self.own:
            try:
                does(tracker)
            except Exception as error:  # whatever a tracker's server or disk has
                if tracker.name not in self.failed:
                    self.say(f"the tracker {tracker.name} failed: {type(error).__name__}: {error}; the run goes on")
                self.failed.add(tracker.name)


def _array(file: Path) -> Any:
    """(1, H, W, 3), bytes."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))[None]


def check(config: Config) -> None:
    """
    Raises:
        ImportError: a tracker that was asked for is not installed.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"trackers: {name} is not installed: pip install {name}")


@contextmanager
def tracked(trainer: Trainer, own: run.Run, command: Sequence[str]) -> Iterator[None]:
    """Inside, what the run logs is told to its trackers; afterwards, how it ended. One process speaks to them."""
    if not own.main:
        yield
        return
    config, accelerator = trainer.config, trainer.accelerator
    accelerator.log_with = accelerator.log_with or []
    if config.history:
        accelerator.log_with.append(LedgerTracker(row_of(trainer, own, command), own.say))
    settings = leaves(config.model_dump(mode="json"))
    flat = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings}
    names = {"name": own.folder.name}
    kwargs = {"wandb": names | {"dir": str(own.folder)}, "trackio": names, "mlflow": {"run_name": own.folder.name}}
    own.trackers = Trackers(begun(accelerator, flat, kwargs, own.say), own.say)
    state = runs.FAILED
    try:
        yield
        state = runs.ENDED if own.result.is_dir() else runs.STOPPED
    except KeyboardInterrupt:
        state = runs.STOPPED
        raise
    finally:
        own.trackers.ended(state)
        accelerator.trackers.clear()


def begun(accelerator: Any, config: Any, options: Any, say: Callable[[str], None]) -> list[Any]:
    """The trackers that could be begun, one after another: one that fails is told and does without."""
    found, wanted = [], list(accelerator.log_with)
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers(PROJECT, config=config, init_kwargs=options)
        except Exception as error:  # whatever a tracker, its disk or its network has
            name = getattr(tracker, "name", tracker)
            say(f"the tracker {name} cannot begin ({summary(error)}); the run goes on without it")
            continue
        found += accelerator.trackers
    accelerator.log_with, accelerator.trackers = wanted, found
    return found


def row_of(trainer: Trainer, own: run.Run, command: Sequence[str]) -> dict[str, Any]:
    config, folder = trainer.config, own.folder.absolute()
    about = new_run(folder, shlex.join(command) or "train(config)")
    whole = {"config": config.model_dump(mode="json"), "target": config.target, "steps": config.steps}
    return about | whole | {"folder": str(folder), "step": trainer.step}
