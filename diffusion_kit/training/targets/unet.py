"""The UNet of a base, with what it is conditioned by if that is to learn along: text encoders, or the image encoder of a
Kandinsky prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_kit.models.text import Layer
from diffusion_kit.training.bases import as_given, load_base
from diffusion_kit.training.config import Config

from .target import Denoising, in_float32

KEYS = {"encoders": False}  # of `network`: whether the encoders are trained too


class UNetTarget(Denoising):
    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        self.base = load_base(config, device)
        self.unet = in_float32(self.base.unet)
        own = {**KEYS, **config.network}
        if unknown := set(own) - set(KEYS):
            raise ValueError(f"no key network.{min(unknown)} for the target unet; there is {', '.join(KEYS)}")
        encoders = [encoder for _, encoder in self.base.encoders]
        encoders = encoders if self.base.prior is None else [self.base.prior.image_encoder]
        encoders = encoders if own["encoders"] else []
        self.encoders = nn.ModuleList(in_float32(encoder) for encoder in encoders)
        for encoder in self.encoders[:-1]:  # of these only states before the last layer are seen, no pooled one
            freeze_unseen(encoder, self.base.layer)

    def save(self, folder: Path) -> None:
        own = self.config.base
        as_given(self.base.pipe, own.model, self.config).save_pretrained(folder, safe_serialization=True)
        if self.base.prior is not None and len(self.encoders):
            as_given(self.base.prior, str(own.prior), self.config).save_pretrained(
                folder / "prior", safe_serialization=True
            )

    def checkpoint_gradients(self) -> None:
        super().checkpoint_gradients()
        for encoder in self.encoders:
            encoder.gradient_checkpointing_enable()  # type: ignore[operator]


def freeze_unseen(encoder: Any, layer: Layer) -> None:
    """Leaves out of training what comes after the layer whose states are taken: processes wait for every gradient."""
    net = getattr(encoder, "text_model", encoder)
    for part in net.encoder.layers[len(net.encoder.layers) - layer.back :]:
        part.requires_grad_(False)
    net.final_layer_norm.requires_grad_(layer.normed)


def make(config: Config, device: torch.device) -> Any:
    return UNetTarget(config, device)
