"""Training from a configuration to a result: puts data, cache, target, loop and checkpoints together."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffusion_kit.evaluation.measures import measures_of

from . import caching, card, checkpoints, memory, run, trial, validation
from .bases import Base
from .config import CacheConfig, Config
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
        config = with_batch(run.settled(config, resume), accelerator, print)
        start = run.begin(config, resume, allow) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process and resume:
            found = checkpoints.whole(folder / "checkpoints")
            start = checkpoints.read(found[-1]) if found else None
        own = run.Run(folder, accelerator.is_main_process)
        trainer = make_trainer(config, accelerator, own.say)
        if start is not None:
            trainer.load(start)
            own.say(f"goes on at step {trainer.step} of {config.steps}")
        else:
            trainer.target.begin(first_batches(trainer))
        if own.main:
            own.cut_logs(trainer.step)
        if trainer.step < config.steps:
            with memory.explained(trainer), Watch(trainer, own, signals) as watch:
                trainer.run(watch)
        if trainer.step < config.steps:
            own.say(f"stopped at step {trainer.step} of {config.steps}; go on with: {run.resume_command(command)}")
            return None
        return finish(trainer, own)


def make_accelerator(config: Config) -> Accelerator:
    cpu = not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("precision=fp16 needs a GPU: on a CPU take bf16, or no")
    return Accelerator(mixed_precision=config.precision, cpu=cpu)


def check(config: Config, say: Callable[[str], None]) -> bool:
    """Looks at a training before it is begun: see `trial`; whether one batch could be learned."""
    if config.threads:
        torch.set_num_threads(config.threads)
    config = with_batch(config.model_copy(update={"cache": CacheConfig()}), make_accelerator(config), say)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    return trial.check(make_trainer(config, make_accelerator(config), say), folder / "check.png", say)


def with_batch(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Config:
    """The configuration with a number where `batch` is auto: as many pictures as fit, in every process."""
    if config.batch != "auto":
        return config
    probe = config.model_copy(update={"batch": accelerator.num_processes, "micro_batch": 1})
    micro = memory.fitting_batch(make_trainer(probe, accelerator, say), say)
    say(f"batch: {micro * accelerator.num_processes}")
    return config.model_copy(update={"batch": micro * accelerator.num_processes, "micro_batch": micro})


def make_trainer(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Trainer:
    if config.validation.measure is not None:
        measures_of(config.validation.measure)
    torch.manual_seed(config.seed)  # of weights that begin at random
    target = make_target(config, accelerator.device)
    pictures = open_pictures(config, target.conditioned)
    fill_cache(config, target.base, pictures, (accelerator.process_index, accelerator.num_processes), say)
    accelerator.wait_for_everyone()
    for store in pictures.cache.stores:
        store.refresh()
    if target.base is not None:
        target.base.put_away(pictures.cache)
    return Trainer(config, accelerator, target, pictures, say)


def build_cache(config: Config, part: tuple[int, int], say: Callable[[str], None]) -> None:
    """Fills the cache of a configuration, or one of several shares of it: `part` is (share, number of shares).

    Raises:
        FileNotFoundError, ValueError: data, base or configuration that cannot be used, in one line.
    """
    target = make_target(config, make_accelerator(config).device)
    fill_cache(config, target.base, open_pictures(config, target.conditioned), part, say)


def fill_cache(
    config: Config, base: Base | None, pictures: Pictures, part: tuple[int, int], say: Callable[[str], None]
) -> None:
    """Opens the cache and fills a share of what is missing."""
    encoders = base.frozen_encoders if base is not None else {}
    pictures.cache = open_cache(config, base.vae if base is not None else None, encoders, pictures.conditioned)
    if not pictures.cache.stores:
        return
    made = caching.fill(config, base, pictures, pictures.cache, say, part)
    held = ", ".join(f"{len(store)} in {store.folder}" for store in pictures.cache.stores)
    say(f"{made} views are new; the cache holds {held}")


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
        found = f"loss {line['loss']:.4f}  {timing['images_per_second']:.1f} images/s"
        self.bar.set_postfix_str(found, refresh=False)
        if self.bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(timing["seconds_left"]))
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


def finish(trainer: Trainer, own: run.Run) -> Path:
    """Writes the result beside and renames it."""
    if own.main:
        beside = own.folder / ".result.part"
        shutil.rmtree(beside, ignore_errors=True)
        with trainer.averaged():
            trainer.target.finish(first_batches(trainer))
            trainer.target.save(beside)
        card.write(trainer, beside, *last_validation(own))
        shutil.rmtree(own.result, ignore_errors=True)
        beside.rename(own.result)
        own.say(f"the result is in {own.result}")
    trainer.accelerator.wait_for_everyone()
    return own.result


def last_validation(own: run.Run) -> tuple[dict[str, float] | None, Path | None]:
    """Figures and folder of the last validation."""
    file = own.folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    validated = [row for row in rows if "validation" in row]
    if not validated:
        return None, None
    return validated[-1]["validation"], own.folder / "validation" / f"step-{validated[-1]['step']:08d}"


def first_batches(trainer: Trainer) -> list[Batch]:
    """Some batches as they came first."""
    plan = MicroBatches(trainer.order, trainer.part, 0, min(FINISH, trainer.config.steps))
    return [batch for step in batches(trainer.pictures, plan, 0) for batch in step]
