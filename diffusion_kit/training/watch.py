"""What happens between the steps of a training: the log, validation, checkpoints, and the end that a signal asks for."""

from __future__ import annotations

import math
import time
from datetime import timedelta

import torch
from tqdm import tqdm

from . import checkpoints, run, validation
from .loop import Trainer


class Watch:
    """What happens between steps: the log, checkpoints, and the end that a signal asks for."""

    def __init__(self, trainer: Trainer, own: run.Run, signals: run.Signals) -> None:
        self.run, self.signals = own, signals
        self.clock = run.Clock(trainer.config.steps, trainer.order.batch, trainer.step)
        self.saved = time.monotonic()
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
        if step % config.log_every == 0 or step == config.steps:
            self.log(trainer)
        validated = bool(config.validation.every) and (step % config.validation.every == 0 or step == config.steps)
        if validated:
            self.validate(trainer)
        stop, late = self.agreed(trainer)
        if stop or late or validated or step % config.checkpoints.every == 0 or step == config.steps:
            save(trainer, self.run)
            self.saved = time.monotonic()
        return stop

    def validate(self, trainer: Trainer) -> None:
        """Validates, and remembers the best."""
        if self.run.main:
            step = trainer.step
            figures = validation.validate(trainer, self.run.folder / "validation" / f"step-{step:08d}")
            self.run.log("metrics", {"step": step, "validation": figures})
            fidelity = figures.get("fidelity", math.nan)
            if not math.isnan(fidelity) and (trainer.best is None or fidelity > trainer.best["fidelity"]):
                trainer.best = {"step": step, "fidelity": fidelity}
            self.run.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        trainer.accelerator.wait_for_everyone()

    def agreed(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether a checkpoint is late: the same answer in all of them."""
        minutes = trainer.config.checkpoints.minutes
        late = minutes is not None and time.monotonic() - self.saved > 60 * minutes
        own = (self.signals.received is not None, late)
        if trainer.part.processes == 1:
            return own
        flags = torch.tensor([own], dtype=torch.int32, device=trainer.accelerator.device)
        stop, late = trainer.accelerator.gather(flags).amax(0).tolist()
        return bool(stop), bool(late)

    def log(self, trainer: Trainer) -> None:
        line = {"step": trainer.step, **trainer.figures.line()}
        line["learning_rate"] = trainer.optimizer.param_groups[0]["lr"]
        timing = self.clock.row(trainer.step)
        self.run.log("metrics", line)
        self.run.log("timing", {"step": trainer.step, **timing})
        found = f"loss {line['loss']:.4f}  {timing['images_per_second']:.1f} images/s"
        self.bar.set_postfix_str(found, refresh=False)
        if self.bar.disable:
            left = timedelta(seconds=round(timing["seconds_left"]))
            self.run.say(f"step {trainer.step}/{trainer.config.steps}  {found}  {left} left")


def save(trainer: Trainer, own: run.Run) -> None:
    """Writes a checkpoint of the step at hand, and prunes."""
    if own.main and not checkpoints.is_whole(checkpoints.folder_of(own.checkpoints, trainer.step)):
        content = trainer.checkpoint()
        content.state["environment"] = run.environment(trainer.part.processes)  # type: ignore[index]
        checkpoints.write(own.checkpoints, trainer.step, content)
        best = int(trainer.best["step"]) if trainer.best is not None else None
        checkpoints.prune(own.checkpoints, trainer.config.checkpoints.keep, best)
    trainer.accelerator.wait_for_everyone()
