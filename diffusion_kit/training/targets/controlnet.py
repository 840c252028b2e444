"""A ControlNet (Zhang et al. 2023, arXiv 2302.05543) for a frozen base; it begins as a copy of the base's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from diffusion_kit.adapters.controlnet import RunControlNet
from diffusion_kit.models.vae import scale_factor
from diffusion_kit.pipelines.kandinsky import Kandinsky22Pipeline
from diffusion_kit.sampling.doors import Answer, at_once
from diffusion_kit.training.bases import Base, Conditioning, load_base
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch

from .target import Denoising, carry, check_keys, given, in_float32

WIDTHS = (16, 32, 96, 256)  # of the embedding of the control image, as published; one for each halving and one


class ControlNetTarget(Denoising):
    conditioned = True

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        self.base = load_base(config, device)
        self.controlnet = self.network().to(device)
        self.run = RunControlNet(self.controlnet, half=False, own_forward=False)

    def network(self) -> Any:
        if self.config.init_from:
            net = given(self.config, ControlNetModel)
            shapes = {name: value.shape for name, value in self.base.unet.state_dict().items()}
            if other := next((n for n, own in net.state_dict().items() if shapes.get(n, own.shape) != own.shape), None):
                raise ValueError(
                    f"init_from {self.config.init_from} is for another base: its {other} has another shape"
                )
            return in_float32(net)
        return in_float32(copied(self.base, hint_settings(self.config, self.base)))

    @property
    def executed(self) -> list[Any]:
        return [self.base.unet, self.controlnet]

    @property
    def control(self) -> Any:
        return self.controlnet

    def answer(self, batch: Batch, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Answer:
        prepared = at_once(self.run.prepare(t[None], conditioning))
        hint = self.run.embed(batch.condition)  # type: ignore[arg-type]
        answer = self.run({**prepared, "hint": hint, "weights": self.ones(noisy)}, noisy, 1)
        dtype = self.base.unet.dtype
        return Answer(skips=tuple(own.to(dtype) for own in answer.skips), mid=answer.mid.to(dtype))  # type: ignore[union-attr]

    def ones(self, like: Tensor) -> list[Tensor]:
        return [like.new_ones(1)] * (len(self.controlnet.controlnet_down_blocks) + 1)

    def save(self, folder: Path) -> None:
        self.controlnet.save_pretrained(folder, safe_serialization=True)


def make(config: Config, device: torch.device) -> Any:
    return ControlNetTarget(config, device)


def copied(base: Base, settings: dict[str, Any], **more: Any) -> Any:
    """A fresh ControlNet of the base, whose embedding carries the control image up to its last, zero convolution."""
    net = ControlNetModel.from_unet(base.unet, **settings, **more)
    embedding = net.controlnet_cond_embedding
    carry(embedding.conv_in, *embedding.blocks)
    return net


def hint_settings(config: Config, base: Base) -> dict[str, Any]:
    """
    Raises:
        ValueError: a base whose UNet has no ControlNet.
    """
    if isinstance(base.pipe, Kandinsky22Pipeline):
        raise ValueError(
            "Kandinsky 2.2 has no ControlNet of this kind: train target=hint_decoder, or target=t2i_adapter"
        )
    halvings = scale_factor(base.vae).bit_length() - 1
    settings = {
        "conditioning_channels": config.data.condition.channels,
        "conditioning_embedding_out_channels": WIDTHS[: halvings + 1],
    }
    check_keys(ControlNetModel.from_unet, config.network, "ControlNet")
    return {**settings, **config.network}
