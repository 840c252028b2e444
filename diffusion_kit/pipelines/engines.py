"""The engines by name, and which of them is the fastest here."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kit.models import onednn
from diffusion_kit.models.packed import Packing, unpack_all
from diffusion_kit.sampling.engines import AOTI, Compiled, CudaGraphs, Engine, OpenVINO, eager

ENGINES: dict[str, Callable[[], Engine]] = {
    "eager": lambda: eager,
    "packed": Packing,
    "openvino": lambda: OpenVINO(cache_folder()),
    "inductor": Compiled,
    "aoti": lambda: AOTI(cache_folder()),
    "cudagraph": CudaGraphs,
}
QUICK = ("eager", "packed", "openvino", "cudagraph")  # ready in seconds
ROUNDS, SIDE, TOKENS = 5, 64, 77  # of a probe


def cache_folder() -> Path:
    """Where engines keep what they made of networks: DIFFUSION_KIT_CACHE, or .cache/diffusion_kit of the user's home."""
    return Path(os.environ.get("DIFFUSION_KIT_CACHE") or Path.home() / ".cache" / "diffusion_kit").resolve()


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no such engine here, or None.

    Raises:
        ValueError: there is none of that name anywhere.
    """
    if name not in ENGINES:
        raise ValueError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    if name in ("packed", "openvino") and device.type != "cpu":
        return f"{name} is for a CPU, the pipeline is on {device}"
    if name == "cudagraph" and device.type != "cuda":
        return f"cudagraph is for CUDA, the pipeline is on {device}"
    if name == "openvino":
        try:
            importlib.import_module("openvino")
        except ModuleNotFoundError:
            return "openvino is not installed: pip install 'diffusion_kit[openvino]'"
        except Exception as error:  # a library that lacks another, or one of another version
            return f"openvino cannot be imported: {str(error).strip().splitlines()[0]}"
    return onednn.obstacle(dtype) if name == "packed" else None


def fastest(unet: Any) -> tuple[Engine, dict[str, float]]:
    """The engine that is fastest over a piece of a UNet, and the seconds of each; eager, and none, for a UNet whose pieces
    are not known. Those that compile for minutes are left out: they are used where they are asked for."""
    found = make_probe(unet)
    if found is None:
        return eager, {}
    probe, inputs = found
    names = [name for name in QUICK if missing(name, unet.device, unet.dtype) is None]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        engines = {
            name: OpenVINO(Path(folder), parks=False) if name == "openvino" else ENGINES[name]() for name in names
        }
        for name, engine in [*engines.items()] * ROUNDS:
            try:
                run = (
                    engine.captured(probe, inputs, "a block")  # it leaves single networks as they are
                    if isinstance(engine, CudaGraphs)
                    else engine.network(probe)
                )
                run(*inputs)  # lays weights out, or converts
                seconds[name].append(timed(lambda run=run: run(*inputs), unet.device))
            except Exception as error:
                if name == "eager":
                    raise
                engine.cannot("a block", error)
            unpack_all(probe.executed)
    medians = {name: median(own) for name, own in seconds.items() if not engines[name].notes}
    return ENGINES[min(medians, key=medians.__getitem__)](), medians


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    run()
    return now() - start


@dataclass(frozen=True)
class Probe:
    """A residual block and, where there is one, a transformer block of a UNet."""

    resnet: nn.Module
    transformer: nn.Module | None

    @property
    def executed(self) -> tuple[nn.Module, ...]:
        return tuple(part for part in (self.resnet, self.transformer) if part is not None)

    def __call__(self, x: Tensor, emb: Tensor, states: Tensor) -> Tensor:
        h = self.resnet(x, emb)
        if self.transformer is None:
            return h
        return self.transformer(h.flatten(2).transpose(1, 2), encoder_hidden_states=states)


def make_probe(unet: Any) -> tuple[Probe, tuple[Tensor, ...]] | None:
    """Of the deepest down block that has attention, or else of the deepest, with random inputs of the sizes that it sees,
    but no more than `SIDE` latents a side."""
    if not hasattr(unet, "down_blocks"):  # a prior
        return None
    blocks = list(enumerate(unet.down_blocks))
    level, block = next((own for own in reversed(blocks) if hasattr(own[1], "attentions")), blocks[-1])
    if not hasattr(block, "resnets"):
        return None
    resnet = block.resnets[-1]
    transformers = getattr(next(iter(getattr(block, "attentions", ())), None), "transformer_blocks", (None,))
    size = unet.config.sample_size or SIDE
    side = max(1, min(SIDE, *(size if isinstance(size, (list, tuple)) else (size,))) >> level)
    # Of its own, so that pictures that follow have the random numbers that they would have.
    own = torch.Generator(unet.device).manual_seed(0)
    like: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype, "generator": own}
    x = torch.randn(2, resnet.in_channels, side, side, **like)
    emb = torch.randn(2, resnet.time_emb_proj.in_features, **like)
    width = unet.config.cross_attention_dim
    states = torch.randn(2, TOKENS, width if isinstance(width, int) else width[-1], **like)
    return Probe(resnet, transformers[0]), (x, emb, states)
