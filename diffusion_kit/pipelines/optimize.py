"""How a pipeline runs: which engine executes its networks, in what precision, with which approximations; and what of that
it says of itself.

Three levels. "exact" gives the same picture: in float32 within a thousandth of the range of pixels. "half" has weights of
half precision, while schedule and guidance stay in float32. "fast" is half with a step cache, which changes the picture a
little: docs/optimize.md says how much.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from diffusion_kit.sampling.engines import Engine, eager

from .engines import fastest, make_engine
from .memory import set_low_memory
from .quantised import check_quantised, quantise

Level = Literal["exact", "half", "fast"]
LEVELS = get_args(Level)
# Of the step cache: docs/step-cache.md says what it saves and costs.
FAST: dict[str, Any] = {"every": 5, "guidance": "reuse"}


def optimize(pipe: Any, level: str, engine: str | Engine | None, low_memory: bool, quantised: str | None) -> None:
    """Sets a pipeline's precision, step cache, engine and use of memory; `pipe.notes` says what was not possible.

    Raises:
        ValueError: no such level or way to quantise, or no such engine here.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it must be {', '.join(LEVELS)}")
    device, dtype = pipe._execution_device, pipe.unet.dtype if level == "exact" else half_of(pipe._execution_device)
    named = make_engine(engine, device, dtype) if isinstance(engine, str) else engine
    if quantised is not None:
        check_quantised(quantised)
    pipe.notes = []
    if level != "exact":
        with without_empty_warnings():
            pipe.to(dtype)
    elif pipe.unet.dtype != torch.float32:
        pipe.notes.append(f"weights are in {name_of(pipe.unet.dtype)}: for float32 load the pipeline again")
    if quantised is not None:
        quantise(pipe, quantised)
    pipe.cache_steps(None)
    if level == "fast":
        try:
            pipe.cache_steps(**FAST)
        except ValueError as error:
            pipe.notes.append(str(error))
    # An engine is measured before networks leave the device or memory.
    pipe.engine = named or _fastest(pipe, low_memory)
    set_low_memory(pipe, low_memory)


def half_of(device: torch.device) -> torch.dtype:
    """The number type of the levels of half precision."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


@contextmanager
def without_empty_warnings() -> Iterator[None]:
    """diffusers warns of an empty list of modules that it would rather have kept in float32."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def tells(record: logging.LogRecord) -> bool:
        return "kept in float32: []" not in record.getMessage()

    logger.addFilter(tells)
    try:
        yield
    finally:
        logger.removeFilter(tells)


def _fastest(pipe: Any, low_memory: bool) -> Engine:
    device = pipe._execution_device
    if (why := pipe.obstacle) is not None:
        pipe.notes.append(f"eager: the network runs through its own forward, {why}")
        return eager
    if pipe.unet.device != device or (low_memory and device.type != "cpu"):
        pipe.notes.append("eager: networks are on the device while they run only, and lie elsewhere in each call")
        return eager
    engine, seconds = fastest(pipe.unet)
    times = ", ".join(f"{name} {1e3 * own:.1f} ms" for name, own in sorted(seconds.items(), key=lambda pair: pair[1]))
    said = f"was the fastest over a block of the UNet: {times}" if seconds else "this network has no blocks to measure"
    pipe.notes.append(f"{engine.name}{' ' if seconds else ': '}{said}")
    return engine


def explain(pipe: Any) -> Iterator[tuple[str, str]]:
    """What runs where, by the part that it is about."""
    yield "model", str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    yield "device", f"{pipe._execution_device}, {name_of(pipe.unet.dtype)}"
    why = pipe.obstacle
    yield "network", "executor: keys, values and embeddings made once" if why is None else f"its own forward: {why}"
    yield (
        "engine",
        pipe.engine.name if why is None else "eager: networks with a forward of their own are left as they are",
    )
    yield "cache", str(pipe.step_cache or "off")
    yield "scheduler", type(pipe.scheduler).__name__
    if pipe.low_memory:
        yield "memory", "low: encoders leave memory after they ran, large pictures are decoded in pieces"
    for name, net in {**pipe.components, **pipe.__dict__.get("_base_controls", {})}.items():
        if isinstance(net, nn.Module):
            weights = list(net.parameters())
            size = sum(weight.nbytes for weight in weights) / 1e6
            kinds = " and ".join(sorted({name_of(weight.dtype) for weight in weights}))
            yield "memory", f"{size:,.0f} MB of weights: {name}, {type(net).__name__}, {kinds}"
    for note in (*pipe.notes, *pipe.engine.notes):
        yield "note", note


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
