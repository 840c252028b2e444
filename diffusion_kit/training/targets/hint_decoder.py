"""Kandinsky 2.2's ControlNet: a decoder whose own UNet takes the control image, embedded, as extra input channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffusion_kit.models.denoiser import takes_hint
from diffusion_kit.pipelines.kandinsky import Kandinsky22Pipeline
from diffusion_kit.pipelines.kandinsky_peers import KandinskyV22ControlnetPipeline
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.training.bases import Conditioning, as_given, load_base
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch

from .target import Denoising, carry, in_float32

HINT = 4  # channels of an embedded hint


class HintDecoderTarget(Denoising):
    conditioned = True

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        self.base = load_base(config, device)
        if not isinstance(self.base.pipe, Kandinsky22Pipeline):
            raise ValueError(
                f"target hint_decoder is for decoders of Kandinsky 2.2; {config.base.model} is of another family"
            )
        if not takes_hint(self.base.unet):
            self.base.pipe.register_modules(unet=with_hint(self.base.unet))
        self.unet = in_float32(self.base.unet).to(device)

    def answer(self, batch: Batch, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Answer:
        return Answer(channels=self.unet.add_embedding.input_hint_block(batch.condition))

    @property
    def control(self) -> str:
        return "hint"

    def save(self, folder: Path) -> None:
        pipe = as_given(self.base.pipe, self.config.base.model, self.config)
        KandinskyV22ControlnetPipeline.from_pipe(pipe).save_pretrained(folder, safe_serialization=True)


def make(config: Config, device: torch.device) -> Any:
    return HintDecoderTarget(config, device)


@torch.no_grad()
def with_hint(unet: Any) -> Any:
    """A plain decoder's UNet that takes a hint as well; at first it does what it did, since the new weights of its first
    convolution are zero."""
    settings = {**unet.config, "in_channels": unet.config.in_channels + HINT, "addition_embed_type": "image_hint"}
    net = UNet2DConditionModel.from_config({k: v for k, v in settings.items() if not k.startswith("_")})
    weights = dict(unet.state_dict())
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, HINT))
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith("add_embedding.input_hint_block.") for name in missing):
        raise ValueError(f"this UNet cannot be given a hint: {(unexpected or missing)[0]} has no place")
    carry(*(own for own in net.add_embedding.input_hint_block if isinstance(own, nn.Conv2d)))
    return net.to(unet.device, unet.dtype)
