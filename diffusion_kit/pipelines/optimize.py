"""How a pipeline runs: which engine executes its networks, in what precision, with which approximations; and what of that
it says of itself.

Three levels. "exact" gives the same picture: in float32 within a thousandth of the range of pixels. "half" has weights of
half precision, while schedule and guidance stay in float32; on a CPU without arithmetic in bfloat16, where that would be
slower by far, it is exact. "fast" is half with a step cache, which changes the picture a little: docs/optimize.md says how
much.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiControlNetModel, UNet2DConditionModel
from torch import nn

from diffusion_kit.adapters.control_lora import ControlLoRA
from diffusion_kit.models import onednn
from diffusion_kit.models.packed import held_by
from diffusion_kit.models.unet import obstacle
from diffusion_kit.sampling.engines import Engine, eager
from diffusion_kit.sampling.engines.weights import plain_parts
from diffusion_kit.sampling.loop import CALLS

from .engines import ENGINES, QUICK, fastest, missing
from .expected import working_memory
from .memory import set_low_memory
from .quantised import check_quantised, quantise

Level = Literal["exact", "half", "fast"]
LEVELS = get_args(Level)
NO_HALF = "this CPU has no arithmetic in bfloat16"
# Networks that run in steps, as the UNet does.
IN_STEPS = (ControlNetModel, ControlNetUnionModel, MultiControlNetModel, UNet2DConditionModel)
# Of the step cache: docs/step-cache.md says what it saves and costs.
FAST: dict[str, Any] = {"every": 5, "guidance": "reuse"}


def optimize(pipe: Any, level: str, engine: str | Engine | None, low_memory: bool, quantised: str | None) -> None:
    """Sets a pipeline's precision, step cache, engine and use of memory; `pipe.notes` says what was not possible.

    Raises:
        ValueError: no such level, way to quantise or engine.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it must be {', '.join(LEVELS)}")
    device, dtype = pipe._execution_device, pipe.unet.dtype
    dtype = dtype if level == "exact" else half_of(device, dtype)
    lack = missing(engine, device, dtype) if isinstance(engine, str) else None
    if quantised is not None:
        check_quantised(quantised)
    pipe.notes = []
    _set_precision(pipe, level, dtype)
    if quantised is not None:
        quantise(pipe, quantised)
    pipe.cache_steps(None)
    if level == "fast":
        try:
            pipe.cache_steps(**FAST)
        except ValueError as error:
            pipe.notes.append(str(error))
    if lack is not None:
        pipe.notes.append(f"{lack}: the fastest engine here takes its place, pixels may differ by rounding")
        engine = None
    # An engine is measured before networks leave the device or memory.
    named = ENGINES[engine]() if isinstance(engine, str) else engine
    pipe.engine = named or _fastest(pipe, low_memory)
    set_low_memory(pipe, low_memory)


def _set_precision(pipe: Any, level: str, dtype: torch.dtype) -> None:
    """The number type of every network of the pipeline and of controls that are loaded, where the level asks for one."""
    if level == "exact":
        if dtype != torch.float32:
            pipe.notes.append(f"weights are in {name_of(dtype)}: for float32 load the pipeline again")
        return
    with without_empty_warnings():
        pipe.to(dtype)
    for control in pipe.__dict__.get("_base_controls", {}).values():
        if isinstance(control, nn.Module):
            control.to(dtype)
    if dtype == torch.float32:
        pipe.notes.append(f"{NO_HALF}: weights are in float32")


def half_of(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """The number type of the levels of half precision; weights that are in one already keep it, but on a CPU. A CPU
    without arithmetic in bfloat16 computes faster in float32: a convolution by a factor of more than a hundred."""
    if device.type == "cpu":
        return torch.bfloat16 if onednn.has_bfloat16() else torch.float32
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


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
    lacking = [why for name in QUICK if (why := missing(name, device, pipe.unet.dtype)) and why not in str(pipe.notes)]
    slow = " and ".join(name for name in ENGINES if name not in QUICK)
    pipe.notes.append("; ".join(["not measured: " + slow + " compile for minutes and are used when named", *lacking]))
    return engine


def explain(pipe: Any, *, expected: bool) -> str:
    """What runs where, a line each; with the memory that is `expected` beside weights, which takes seconds to count."""
    return "\n".join(f"{label:11}{text}" for label, text in _told(pipe, expected))


def _told(pipe: Any, expected: bool) -> Iterator[tuple[str, str]]:
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
    total = 0
    for name, net in networks(pipe).items():
        sizes = sizes_of(net)
        total += sum(sizes.values())
        kinds, size = " and ".join(sorted(map(name_of, sizes))), sum(sizes.values()) / 1e6
        yield "runs", f"{name} {executor_of(pipe, name, net)}: {type(net).__name__}, {kinds}, {size:,.0f} MB"
    yield "memory", f"{total / 1e6:,.0f} MB of weights in all"
    if expected and (working := working_memory(pipe)) is not None:
        height, width = pipe.native_size
        step, decoding = (f"{own / 1e6:,.0f} MB" for own in working)
        yield (
            "memory",
            f"beside them about {step} in a guided step, {decoding} in decoding of {width} x {height} pixels",
        )
    if pipe.done:
        parts = (f"{name} in {count}" for name, count in pipe.done.items() if name != CALLS)
        yield "last call", ", ".join([f"{pipe.done[CALLS]} {CALLS}", *parts])
    for note in (*pipe.notes, *pipe.engine.notes):
        yield "note", note


def networks(pipe: Any) -> dict[str, Any]:
    """The pipeline's networks and the controls that came with the model and are loaded, by name."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {**parts, **pipe.__dict__.get("_base_controls", {})}


def executor_of(pipe: Any, name: str, net: Any) -> str:
    """What runs one of the networks."""
    if net is pipe.unet or isinstance(net, IN_STEPS):
        parts = net.nets if isinstance(net, MultiControlNetModel) else [net]
        whole = all((pipe.obstacle if own is pipe.unet else obstacle(own)) is None for own in parts)
        return f"by {pipe.engine.name}" if whole else "through its own forward"
    if isinstance(net, ControlLoRA):
        return "as what the UNet becomes with it"
    if "text_encoder" in name or name == "prior_prior":
        return "by eager" if pipe.low_memory or pipe.engine.only_steps else f"by {pipe.engine.name}"
    if name in ("vae", "movq"):
        if pipe.engine.only_steps:
            return "by eager"
        ways = {"its encoder": pipe.low_memory, "large or several pictures": in_pieces(net)}
        apart = [what for what, so in ways.items() if so]
        return f"by {pipe.engine.name}" + (f", {' and '.join(apart)} as it is" if apart else "")
    return "as it is, before the first step"


def in_pieces(vae: Any) -> bool:
    return any(getattr(vae, f"use_{name}", False) for name in ("tiling", "slicing"))


def sizes_of(net: Any) -> Counter[torch.dtype]:
    """Bytes of a network's weights by their type. Layers that are packed stay so."""
    sizes: Counter[torch.dtype] = Counter()
    if isinstance(net, ControlLoRA):
        weights = [part for pair in net.pairs.values() for part in pair] + list(net.whole.values())
    else:
        weights = list({id(own): own for module in net.modules() for own in held_by(module)}.values())
    for part in (part for weight in weights for part in plain_parts(weight)):
        sizes[part.dtype] += part.numel() * part.element_size()
    return sizes


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
