"""A T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) for a frozen base."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor

from diffusion_kit.models.denoiser import residual_fit
from diffusion_kit.models.vae import scale_factor
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.training.bases import Base, Conditioning, load_base
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch

from .target import Denoising, built, given, in_float32

PROBE = 64  # side of the latents at which the shapes of residuals are compared


class T2IAdapterTarget(Denoising):
    """
    Attributes:
        gain: `network.gain`, by which the features are multiplied; the weights that are saved have it in them. A fresh
            adapter's features have a spread of about 0.1: where the base's own are a hundred times that, it would learn
            for long just to be heard, and grow out of proportion.
    """

    conditioned = True
    gain = 1.0

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        self.base = load_base(config, device)
        network = dict(config.network)
        self.gain = positive(network.pop("gain", self.gain))
        settings = {"in_channels": config.data.condition.channels, **fitting(self.base), **network}
        adapter = times(1 / self.gain, given(config, T2IAdapter)) if config.init_from else built(T2IAdapter, settings)
        self.adapter = in_float32(adapter).to(device)
        check_fit(self.adapter, self.base)

    def answer(self, batch: Batch, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Answer:
        features = self.adapter(batch.condition)
        return Answer(intra=tuple((self.gain * feature).to(self.base.unet.dtype) for feature in features))

    @property
    def control(self) -> Any:
        return self.adapter if self.gain == 1 else times(self.gain, self.adapter)

    def save(self, folder: Path) -> None:
        self.control.save_pretrained(folder, safe_serialization=True)


def make(config: Config, device: torch.device) -> Any:
    return T2IAdapterTarget(config, device)


def positive(gain: Any) -> float:
    """
    Raises:
        ValueError: a gain that is no positive number.
    """
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
        raise ValueError(f"network.gain is {gain!r}: a positive number is needed, 1 for features as they are")
    return float(gain)


def times(gain: float, adapter: Any) -> Any:
    """A copy that gives `gain` times the features: an adapter is convolutions and ReLU, so it is enough that its first
    convolution and all biases are multiplied."""
    grown = copy.deepcopy(adapter)
    with torch.no_grad():
        next(grown.parameters()).mul_(gain)
        for name, weight in grown.named_parameters():
            if name.endswith(".bias"):
                weight.mul_(gain)
    return grown


def fitting(base: Base) -> dict[str, Any]:
    """Settings of an adapter that fits a base: as many levels as there is a type of adapter for."""
    fit = residual_fit(base.unet, (PROBE, PROBE))
    channels, sides = [own for own, _ in fit], [size[0] for _, size in fit]
    first = scale_factor(base.vae) * PROBE // sides[0]
    if sides == [sides[0], sides[0], sides[0] // 2, sides[0] // 2]:
        return {"adapter_type": "full_adapter_xl", "channels": channels, "downscale_factor": first}
    levels = next((k for k in range(1, len(sides)) if sides[k] * 2 != sides[k - 1]), len(sides))
    return {"adapter_type": "full_adapter", "channels": channels[:levels], "downscale_factor": first}


@torch.no_grad()
def check_fit(adapter: Any, base: Base) -> None:
    """
    Raises:
        ValueError: the adapter's features are not what the base takes.
    """
    side = PROBE * scale_factor(base.vae)
    features = adapter(torch.zeros(1, adapter.config.in_channels, side, side, device=adapter.device))
    gives = [(own.shape[1], tuple(own.shape[2:])) for own in features]
    takes = residual_fit(base.unet, (PROBE, PROBE))
    if gives != takes[: len(gives)]:
        told = [", ".join(f"{c} x {h} x {w}" for c, (h, w) in shapes) for shapes in (gives, takes)]
        raise ValueError(
            f"network: this adapter gives {told[0]} for latents of {PROBE} x {PROBE}, the base takes {told[1]}"
        )
