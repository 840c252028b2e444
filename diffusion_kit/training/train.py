"""Training from a configuration to a result: puts data, cache, target, loop and checkpoints together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from . import caching, checkpoints, run, validation
from .bases import Base
from .config import Config
from .data.cache import open_cache
from .data.samples import Batch, Pictures, open_pictures
from .loader import MicroBatches, batches
from .loop import Trainer
from .targets import make_target

FINISH = 64  # batches over which a target measures itself at the end


def train(
    config: Config, *, resume: bool = False, allow: Sequence[str] = (), command: Sequence[str] = ()
) -> Path | None:
    """Trains, or goes on; the folder of the result, or None where it was asked to stop before the end.

    Args:
        resume: go on from the newest whole checkpoint of `config.output`.
        allow: keys whose values may differ from those that the run began with.
        command: what the user typed, for the line that says how to go on.

    Raises:
        FileNotFoundError, ValueError: data, base or configuration that cannot be used, in one line.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config)
    folder = Path(config.output)
    with run.locked(folder) if accelerator.is_main_process else nullcontext(), run.Signals() as signals:
        start = run.begin(config, resume, allow) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process and resume:
            found = checkpoints.whole(folder / "checkpoints")
            start = checkpoints.read(found[-1]) if found else None
        own = run.Run(folder, accelerator.is_main_process)
        trainer = make_trainer(config, accelerator, own)
        if start is not None:
            trainer.load(start)
            own.say(f"goes on at step {trainer.step} of {config.steps}")
        else:
            trainer.target.begin(first_batches(trainer))
        if own.main:
            own.cut_logs(trainer.step)
        if trainer.step < config.steps:
            trainer.run(Watch(trainer, own, signals))
        if trainer.step < config.steps:
            own.say(f"stopped at step {trainer.step} of {config.steps}; go on with: {run.resume_command(command)}")
            return None
        return finish(trainer, own)


def make_accelerator(config: Config) -> Accelerator:
    cpu = not torch.cuda.is_available()
    return Accelerator(mixed_precision=config.precision, cpu=cpu)


def make_trainer(config: Config, accelerator: Accelerator, own: run.Run) -> Trainer:
    torch.manual_seed(config.seed)  # of weights that begin at random
    target = make_target(config, accelerator.device)
    pictures = open_pictures(config, target.conditioned)
    fill_cache(config, target.base, pictures, accelerator, own.say)
    return Trainer(config, accelerator, target, pictures, own.say)


def fill_cache(
    config: Config, base: Base | None, pictures: Pictures, accelerator: Accelerator, say: Callable[[str], None]
) -> None:
    """Opens the cache, each process fills its share of what is missing, and what is not needed any more is put away."""
    encoders = base.frozen_encoders if base is not None else {}
    cache = open_cache(config, base.vae if base is not None else None, encoders, pictures.conditioned)
    pictures.cache = cache
    stores = cache.stores
    if not stores:
        return
    made = caching.fill(config, base, pictures, cache, say, (accelerator.process_index, accelerator.num_processes))
    accelerator.wait_for_everyone()
    for store in stores:
        store.refresh()
    say(f"the cache holds {', '.join(f'{len(store)} {store.folder.name}' for store in stores)}; {made} views are new")
    if base is not None:
        base.put_away(cache)


class Watch:
    """What happens between steps: the log, checkpoints, and the end that a signal asks for."""

    def __init__(self, trainer: Trainer, own: run.Run, signals: run.Signals) -> None:
        self.run, self.signals = own, signals
        self.clock = run.Clock(trainer.config.steps, trainer.order.batch, trainer.step)
        self.saved = time.monotonic()

    def __call__(self, trainer: Trainer) -> bool:
        config, step = trainer.config, trainer.step
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
            if trainer.best is None or figures["fidelity"] > trainer.best["fidelity"]:
                trainer.best = {"step": step, "fidelity": figures["fidelity"]}
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
        left = time.strftime("%H:%M:%S", time.gmtime(timing["seconds_left"]))
        self.run.say(
            f"step {trainer.step}/{trainer.config.steps}  loss {line['loss']:.4f}  "
            f"{timing['images_per_second']:.1f} images/s  {left} left"
        )


def save(trainer: Trainer, own: run.Run) -> None:
    """Writes a checkpoint of the step at hand, and prunes."""
    if own.main and not checkpoints.is_whole(checkpoints.folder_of(own.checkpoints, trainer.step)):
        content = trainer.checkpoint()
        content.state["environment"] = run.environment(trainer.part.processes)  # type: ignore[index]
        checkpoints.write(own.checkpoints, trainer.step, content)
        best = int(trainer.best["step"]) if trainer.best is not None else None
        checkpoints.prune(own.checkpoints, trainer.config.checkpoints.keep, best)
    trainer.accelerator.wait_for_everyone()


def finish(trainer: Trainer, own: run.Run) -> Path:
    """Writes the result beside and renames it."""
    if own.main:
        beside = own.folder / ".result.part"
        shutil.rmtree(beside, ignore_errors=True)
        with trainer.averaged():
            trainer.target.finish(first_batches(trainer))
            trainer.target.save(beside)
        shutil.rmtree(own.result, ignore_errors=True)
        beside.rename(own.result)
        own.say(f"the result is in {own.result}")
    trainer.accelerator.wait_for_everyone()
    return own.result


def first_batches(trainer: Trainer) -> list[Batch]:
    """Some batches as they came first."""
    plan = MicroBatches(trainer.order, trainer.part, 0, min(FINISH, trainer.config.steps))
    return [batch for step in batches(trainer.pictures, plan, 0) for batch in step]
