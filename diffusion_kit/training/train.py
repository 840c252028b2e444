"""Training from a configuration to a result: puts data, cache, target, loop and checkpoints together."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from diffusion_kit.adapters.control import granularity
from diffusion_kit.adapters.detectors import check_options, detector, missing
from diffusion_kit.evaluation.measures import measures_of

from . import caching, card, checkpoints, group, memory, precision, run, tracking, trial
from .bases import Base
from .config import CacheConfig, Config
from .data.cache import open_cache
from .data.samples import Batch, Pictures, open_pictures
from .data.store import Store
from .loader import MicroBatches, Part, batches
from .loop import Trainer
from .optimizers import make_optimizer
from .parallel.settings import derived, precise
from .targets import make_target
from .targets.target import Target
from .tracking import tracked
from .watch import Watch

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
    if config.launch.ipex:
        print("launch.ipex: Intel's extension has ended (archived March 2026); torch itself runs bf16 on CPUs")
    config = precise(config)
    accelerator = group.join(config)
    folder = Path(config.output)
    again = run.resume_command(command)
    with (
        ExitStack() as held,
        run.Signals(accelerator.print) as signals,
        memory.explained(config) as told,
    ):
        try:
            group.first(accelerator, lambda: held.enter_context(run.locked(folder)), writes(config, accelerator))
            resume = resume or broadcast_object_list([run.restarted(folder)])[0]
            trainer, own = begin(config, accelerator, resume, allow)
            told.config, told.micro = trainer.config, trainer.part.micro
            signals.stepping = True
        except run.Stopped:
            accelerator.print(f"stopped before the first step; go on with: {again}")
            return None
        try:
            with tracked(trainer, own, command):
                with Watch(trainer, own, signals) as watch:
                    if not watch.validate(trainer):  # that was due when the run ended
                        trainer.run(watch)
                if not watch.ended(trainer):
                    own.say(f"stopped at step {trainer.step} of {trainer.config.steps}; go on with: {again}")
                    return None
                return finish(trainer, own)
        except KeyboardInterrupt:
            own.say(f"interrupted; go on from the last checkpoint with: {again}")
            raise


def begin(config: Config, accelerator: Accelerator, resume: bool, allow: Sequence[str]) -> tuple[Trainer, run.Run]:
    """A training at the step from which it goes on, and its folder."""
    config = with_batch(derived(run.settled(config, resume), accelerator.num_processes), accelerator, print)
    own = run.Run(Path(config.output), accelerator.is_main_process, writes(config, accelerator))
    group.first(accelerator, lambda: run.begin(config, resume, allow), own.writes)
    start = run.newest(own.checkpoints, lambda steps: gather_object([steps])) if resume else None
    trainer = make_trainer(config, accelerator, own.say)
    own.say(precision.told(config, accelerator.device))
    if start is not None:
        check_data(trainer, start, allow)
        trainer.load(start)
        if own.writes and (steps := checkpoints.cut(own.checkpoints, trainer.step)):
            own.say(f"checkpoints of step {', '.join(map(str, steps))} are removed: not every machine has them")
        own.say(f"goes on at step {trainer.step} of {config.steps}")
        for change in run.changes(start.state["environment"], run.environment(accelerator.num_processes)):
            own.say(f"{change}: the numbers may differ in their last digits")
    else:
        if resume:
            own.say("there is no checkpoint to go on from: begins at the first step")
        with trainer.parallel.started():
            trainer.target.begin(lambda: first_batches(trainer))
    if own.main:
        own.cut_logs(trainer.step)
    return trainer, own


def writes(config: Config, accelerator: Accelerator) -> bool:
    """Whether this process writes checkpoints."""
    return accelerator.is_local_main_process if config.checkpoints.each_machine else accelerator.is_main_process


def check_data(trainer: Trainer, start: checkpoints.Checkpoint, allow: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the data has other pictures than when the checkpoint was written, and that was not allowed.
    """
    before, now = start.state.get("data"), trainer.pictures.digest
    if before not in (None, now) and not any(key.split(".")[0] == "data" for key in allow):
        raise ValueError(
            f"data.sources had {before['pictures']} pictures at step {start.state['step']}, now there are "
            f"{now['pictures']}, or they have other names: give them back, or allow it with --allow-change data"
        )


def check(config: Config, say: Callable[[str], None]) -> bool:
    """Looks at a training before it is begun: see `trial`; whether one batch could be learned."""
    if config.threads:
        torch.set_num_threads(config.threads)
    config = precise(config)
    with memory.explained(config):
        config = with_batch(
            config.model_copy(update={"cache": CacheConfig(), "deepspeed": None}), group.join(config), say
        )
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(config, group.join(config), say)
        trainer.target.begin(lambda: first_batches(trainer))
        return trial.check(trainer, folder / "check.png", say)


def with_batch(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Config:
    """The configuration with a number where `batch` is auto: as many pictures as fit, in every process."""
    if config.batch != "auto":
        return config
    if config.deepspeed is not None:
        raise ValueError("batch is auto, which DeepSpeed does not try out: give a number")
    probe = config.model_copy(update={"batch": accelerator.num_processes, "micro_batch": 1})
    micro = memory.fitting_batch(make_trainer(probe, accelerator, say), say)
    accelerator.free_memory()  # which else keeps what it prepared
    gc.collect()
    say(f"batch: {micro * accelerator.num_processes}")
    return config.model_copy(update={"batch": micro * accelerator.num_processes, "micro_batch": micro})


def make_trainer(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Trainer:
    check_soon(config, accelerator.num_processes)
    torch.manual_seed(config.seed)  # of weights that begin at random
    target, pictures = prepare(config, accelerator.device, say)
    if config.gradient_checkpointing:
        target.checkpoint_gradients()
    attach_cache(config, target.base, pictures)
    filler = Filler(config, target.base, pictures, say)
    if filler.stores:
        say(held(filler.fill((accelerator.process_index, accelerator.num_processes)), filler.stores))
    accelerator.wait_for_everyone()
    for store in pictures.cache.stores:
        store.refresh()
    if target.base is not None:
        target.base.put_away(pictures.cache)
    trainer = Trainer(config, accelerator, target, pictures, say)
    group.check(config, accelerator, trainer.parallel)
    return trainer


def prepare(config: Config, device: torch.device, say: Callable[[str], None]) -> tuple[Target, Pictures]:
    """The target and its data.

    Raises:
        FileNotFoundError, ValueError: they cannot be used, or do not fit each other, in one line.
    """
    target = make_target(config, device)
    own = config.data.condition
    if target.conditioned and own.detector is not None:
        check_options(own.detector, detector(own.detector), own.options)
        if lack := missing(own.detector, own.options.get("model")):
            raise ValueError(f"data.condition.detector: {lack}")
    if target.base is None and config.cache.folder is not None:
        say(f"cache.folder: a target {config.target} has nothing to keep there")
    pictures = open_pictures(config, target.conditioned)
    check_sizes(target, pictures)
    return target, pictures


def check_soon(config: Config, processes: int) -> None:
    """What can be wrong before anything is loaded.

    Raises:
        ValueError, ImportError: in one line.
    """
    if config.batch != "auto" and config.batch % processes:
        told = f"batch is {config.batch}, which {processes} processes cannot share"
        raise ValueError(f"{told}: make it a multiple of their number")
    tracking.check(config)
    make_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    if config.validation.measure is not None:
        measures_of(config.validation.measure)
        if lack := missing(config.validation.measure):  # said now, not at the first validation
            raise ValueError(f"validation.measure: {lack}")


def check_sizes(target: Target, pictures: Pictures) -> None:
    """
    Raises:
        ValueError: sides that the autoencoder or the control cannot make smaller without a rest.
    """
    nets = [target.control] if target.conditioned and isinstance(target.control, torch.nn.Module) else []
    multiple = granularity(target.scale_factor, nets)
    if odd := next((side for size in pictures.sizes for side in size if side % multiple), None):
        raise ValueError(f"data.resolution, data.bucket_step: a side of {odd} pixels is no multiple of {multiple}")


def build_cache(config: Config, part: tuple[int, int], say: Callable[[str], None]) -> None:
    """Fills the cache of a configuration, or one of several shares of it: `part` is (share, number of shares).

    Raises:
        FileNotFoundError, ValueError: data, base or configuration that cannot be used, in one line.
    """
    with run.Signals(), memory.explained(config):
        try:
            filler = make_filler(config, say)
            if filler.stores:
                say(held(filler.fill(part), filler.stores))
        except run.Stopped:
            raise InterruptedError("stopped; what was made is kept, the same command goes on") from None


@dataclass(frozen=True)
class Filler:
    """What fills shares of a cache, one after another, in one process or in one of many."""

    config: Config
    base: Base | None
    pictures: Pictures
    say: Callable[[str], None]

    @property
    def stores(self) -> list[Store]:
        return self.pictures.cache.stores

    def fill(self, part: tuple[int, int]) -> int:
        """How many views were made; what others made before is not made again."""
        for store in self.stores:
            store.refresh()
        return caching.fill(self.config, self.base, self.pictures, self.pictures.cache, self.say, part)


def make_filler(config: Config, say: Callable[[str], None]) -> Filler:
    """Loads base and data, and opens the cache.

    Raises:
        FileNotFoundError, ValueError: they cannot be used, in one line.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    config = precise(config)
    target, pictures = prepare(config, group.join(config).device, say)
    attach_cache(config, target.base, pictures)
    return Filler(config, target.base, pictures, say)


def attach_cache(config: Config, base: Base | None, pictures: Pictures) -> None:
    """Opens the cache, from which pictures then take what it holds."""
    pictured, encoders = (base.pictured, base.frozen_encoders) if base is not None else ([], [])
    pictures.cache = open_cache(config, pictured, encoders, pictures.conditioned)


def held(made: int, stores: Sequence[Store]) -> str:
    own = ", ".join(f"{len(store)} in {store.folder}" for store in stores)
    return f"{made} views are new; the cache holds {own}"


def finish(trainer: Trainer, own: run.Run) -> Path:
    """Writes the result beside and renames it."""
    beside = own.folder / ".result.part"
    with trainer.averaged():
        if own.main or trainer.parallel.spread:
            trainer.target.finish(lambda: first_batches(trainer))
        if own.main:
            shutil.rmtree(beside, ignore_errors=True)
            trainer.target.save(beside)
    if own.main:
        card.write(trainer, beside, *last_validation(own))
        shutil.rmtree(own.result, ignore_errors=True)
        beside.rename(own.result)
        own.say(f"the result is in {own.result}")
    trainer.accelerator.wait_for_everyone()
    return own.result


def last_validation(own: run.Run) -> tuple[dict[str, float] | None, Path | None]:
    """Figures and folder of the last validation."""
    found = own.validations()
    last = max(found, default=None)
    return (None, None) if last is None else (found[last], own.folder / "validation" / f"step-{last:08d}")


def first_batches(trainer: Trainer) -> Iterator[Batch]:
    """Some batches as they came first, the same in every process, one after the other."""
    plan = MicroBatches(trainer.order, Part(0, 1, trainer.part.micro), 0, min(FINISH, trainer.config.steps))
    return (batch for step in batches(trainer.pictures, plan, 0) for batch in step)
