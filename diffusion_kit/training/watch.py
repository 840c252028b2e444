"""What happens between the steps of a training: the log, validation, checkpoints, and the end that a signal asks for."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from . import checkpoints, run, validation
from .loop import Trainer


class Watch:
    """What happens between steps: the log, checkpoints, and the end that a signal asks for."""

    def __init__(self, trainer: Trainer, own: run.Run, signals: run.Signals) -> None:
        self.run, self.signals = own, signals
        self.clock = run.Clock(trainer.config.steps, trainer.order.batch, trainer.step)
        self.saved = time.monotonic()
        self.asked = set[str]()
        self.bar = tqdm(
            total=trainer.config.steps, initial=trainer.step, unit="step", disable=None if own.main else True
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, trainer: Trainer) -> bool:
        config, step = trainer.config, trainer.step
        self.bar.update(1)
        last, due = step == config.steps, self.due(trainer)
        if step % config.log_every == 0 or last:
            self.log(trainer)
        stop, save, validate = self.agreed(trainer)
        self.asked.clear()
        due = due or validate
        if stop or save or due or last or step % config.checkpoints.every == 0:
            self.save(trainer)
            stop = stop or self.agreed(trainer)[0]  # saving may have taken minutes
        if due and not stop:  # who asks a run to end may not wait for it: it is made when the run goes on
            stop = self.validate(trainer, validate)
        return stop

    def validate(self, trainer: Trainer, asked: bool = False) -> bool:
        """Makes the validation that is due, if it was not made yet; whether the run is to stop. What a signal breaks off
        may have left the networks half changed: no step may follow, and the checkpoint was written before."""
        if trainer.any(self.lacks(trainer, asked))[0]:
            spread = trainer.parallel.spread  # then nobody may break off alone
            with trainer.averaged(), nullcontext() if spread else self.signals.breaking_off():
                if self.run.main or spread:
                    self._validate(trainer)
        trainer.accelerator.wait_for_everyone()
        return self.agreed(trainer)[0]

    def lacks(self, trainer: Trainer, asked: bool = False) -> bool:
        return self.run.main and (asked or self.due(trainer)) and trainer.step not in self.run.validations()

    def due(self, trainer: Trainer) -> bool:
        every, step = trainer.config.validation.every, trainer.step
        return bool(every and step) and (step % every == 0 or step == trainer.config.steps)

    def ended(self, trainer: Trainer) -> bool:
        """Whether nothing is left to do but to write the result."""
        return not trainer.any(trainer.step < trainer.config.steps or self.lacks(trainer))[0]

    def _validate(self, trainer: Trainer) -> None:
        step = trainer.step
        with nullcontext(self.run.folder / "validation") if self.run.main else TemporaryDirectory() as root:
            folder = Path(root) / f"step-{step:08d}"
            figures = validation.validate(trainer, folder)
        self.run.log("metrics", {"step": step, "validation": figures})
        self.run.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.run.main:
            self.prune(trainer)
        if self.run.trackers is not None:
            self.run.trackers.validated(folder, step)

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint of the step at hand, if there is none yet, and prunes."""
        if trainer.any(self.run.writes and not checkpoints.is_whole(self.folder(trainer)))[0]:
            content = trainer.checkpoint()  # all take part
            if self.run.writes:
                self.write(trainer, content)
            trainer.accelerator.wait_for_everyone()  # a machine may not have it yet: the one before is all they share
            if self.run.writes:
                self.prune(trainer)
        trainer.accelerator.wait_for_everyone()
        self.saved = time.monotonic()

    def folder(self, trainer: Trainer) -> Path:
        return checkpoints.folder_of(self.run.checkpoints, trainer.step)

    def write(self, trainer: Trainer, content: checkpoints.Checkpoint) -> None:
        content.state["environment"] = run.environment(trainer.part.processes)  # type: ignore[index]
        if not checkpoints.has_space(self.run.checkpoints, content.bytes):
            self.prune(trainer, fewer=1)
        checkpoints.write(self.run.checkpoints, trainer.step, content)

    def prune(self, trainer: Trainer, fewer: int = 0) -> None:
        keep = max(1, trainer.config.checkpoints.keep - fewer)
        checkpoints.prune(self.run.checkpoints, keep, self.run.best())

    def agreed(self, trainer: Trainer) -> tuple[bool, bool, bool]:
        """Whether any process was asked to stop, to save (or a checkpoint is late), and to validate: the same answer in all
        of them."""
        minutes = trainer.config.checkpoints.minutes
        self.asked |= self.run.asked()
        late = minutes is not None and time.monotonic() - self.saved > 60 * minutes
        stop = self.signals.received is not None or "stop" in self.asked
        stop, save, validate = trainer.any(stop, late or "save" in self.asked, "validate" in self.asked)
        return stop, save, validate

    def log(self, trainer: Trainer) -> None:
        line = {"step": trainer.step, **trainer.figures.line()}
        line["learning_rate"] = trainer.parallel.optimizer.param_groups[0]["lr"]
        timing = self.clock.row(trainer.step)
        self.run.log("metrics", line)
        self.run.log("timing", {"step": trainer.step, **timing})
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        found = f"loss {loss}  {timing['images_per_second']:.1f} images/s"
        self.bar.set_postfix_str(found, refresh=False)
        if self.bar.disable:
            left = timedelta(seconds=round(timing["seconds_left"]))
            self.run.say(f"step {trainer.step}/{trainer.config.steps}  {found}  {left} left")
