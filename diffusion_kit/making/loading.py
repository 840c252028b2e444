"""Loads the model that settings name: on its device, in its number type, with its scheduler and engine."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from diffusion_kit.pipelines.auto import AutoPipelineForText2Image
from diffusion_kit.pipelines.engines import missing
from diffusion_kit.pipelines.optimize import LEVELS, half_of

from .fingerprint import fingerprint, short
from .job import HALVED, Settings


def check_execution(settings: Settings) -> None:
    """The device, the level of --optimize, and the engine's name."""
    if settings.optimize not in (None, *LEVELS):
        raise ValueError(f"--optimize is {settings.optimize!r}; it must be one of {', '.join(LEVELS)}")
    device = torch.device(device_of(settings))
    if settings.engine is not None and settings.engine != getattr(settings.old, "engine", None):
        missing(settings.engine, device, dtype_of(settings))  # raises where there is none of that name


def device_of(settings: Settings) -> str:
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"no device {device!r} here; --device cpu always works") from None
    return device


def dtype_of(settings: Settings) -> torch.dtype:
    """The number type in which a model is loaded: that of the level of --optimize, else as asked for."""
    if settings.optimize in HALVED:
        return half_of(torch.device(device_of(settings)))
    return getattr(torch, settings.dtype)


def load_pipeline(settings: Settings, say: Callable[[str], None], *, debug: bool = False, **components: Any) -> Any:
    """The model on its device, quiet but for its progress bar; with `components` in place of its own.

    Args:
        say: told which engine was chosen and why, and what is another than in the recipe of `settings.old`.

    Raises:
        ValueError, FileNotFoundError: no such model, scheduler or device, or not the recipe's, in one line.
    """
    if not debug:
        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    same = _same_model(settings, say)
    old = settings.old if same else None
    name = settings.scheduler or (old.scheduler if old else None)
    scheduler = None if name is None else scheduler_named(name)
    commit = (old.model_hash or "").partition("commit:")[2] if old else ""
    more: dict[str, Any] = {"revision": commit} if commit else {}  # what was compared is what is loaded
    more |= components
    pipe = AutoPipelineForText2Image.from_pretrained(settings.model, torch_dtype=dtype_of(settings), **more)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(old.scheduler_config if old else pipe.scheduler.config)
    device = device_of(settings)
    if settings.low_memory and device != "cpu":  # the whole may be more than there is
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe = pipe.to(device)
    if settings.optimize is not None:
        _optimize(pipe, settings, say)
    return pipe


def _optimize(pipe: Any, settings: Settings, say: Callable[[str], None]) -> None:
    """Says which engine was chosen and why."""
    pipe.optimize(settings.optimize, engine=settings.engine, low_memory=settings.low_memory)
    for line in pipe.notes:
        say(line)
    pipe.engine.listener = say


def _same_model(settings: Settings, say: Callable[[str], None]) -> bool:
    """Whether the model is that of an old recipe. Nothing is fetched from the hub for an old recipe's own model.

    Raises:
        ValueError: it is not, and no other was asked for. FileNotFoundError: it is not here.
    """
    old = settings.old
    if old is None:
        return False
    if old.model_hash is None and not settings.other_model:
        raise ValueError(f"the recipe has no hash of its model {settings.model}: give --model to use it all the same")
    try:
        found = fingerprint(settings.model)
    except FileNotFoundError as error:
        if settings.other_model:  # of the hub, and not here yet
            return False
        raise FileNotFoundError(f"{error}: give --model {settings.model} to look for it elsewhere") from None
    if found == old.model_hash:
        return True
    if settings.other_model:
        say("another model than the recipe's: its own scheduler is used unless --scheduler says otherwise")
        return False
    raise ValueError(
        f"the picture was made with the model {settings.model} of {short(str(old.model_hash))}; "
        f"what stands there now has {short(found)}: give --model to use it all the same"
    )


def scheduler_named(name: str) -> Any:
    """
    Raises:
        ValueError: diffusers has no such scheduler, or it is for models of another kind.
    """
    known = [other for other in dir(diffusers) if other.endswith("Scheduler") and not other.startswith("Flax")]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.3)
        raise ValueError(f"no scheduler {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    scheduler = getattr(diffusers, name)
    if not hasattr(scheduler, "scale_model_input"):
        raise ValueError(f"{name} is made for models of another kind (flow matching), which this version does not have")
    return scheduler
