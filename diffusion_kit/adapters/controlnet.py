"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the UNet's encoder that sees the control image and answers
each step with a residual for every skip connection and the middle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from diffusion_kit.models.denoiser import added_conditions, prepare_embeddings, text_states
from diffusion_kit.models.unet import Net, layout, obstacle
from diffusion_kit.models.unet import encode as encode_unet
from diffusion_kit.sampling.doors import Answer, Conditioning, Tree, conditional, in_every, pick, spread

from .control import Control, EncodedControl, Site, fading
from .pictures import picture_tensor

MODELS = (ControlNetModel,)


@dataclass(frozen=True)
class RunControlNet:
    """Residuals of one ControlNet in one step.

    Attributes:
        half: the network sees, and its residuals reach, the conditional branch only.
        own_forward: the network runs through its own forward (see `models.unet.obstacle`).
    """

    net: Net
    half: bool
    own_forward: bool

    def __call__(self, tensors: Tree, x: Tensor, call: Tensor, branches: int) -> Answer:
        only_half = branches > 1 and self.half
        x = x.chunk(branches)[-1] if only_half else x
        outputs = self._peer(tensors, x, call) if self.own_forward else self._executor(tensors, x, call)
        if self.net.config.global_pool_conditions:
            outputs = [output.mean((2, 3), keepdim=True) for output in outputs]
        outputs = [(weight * output).to(x) for weight, output in zip(tensors["weights"], outputs, strict=True)]
        if only_half:
            outputs = [torch.cat([torch.zeros_like(output)] * (branches - 1) + [output]) for output in outputs]
        return Answer(skips=tuple(outputs[:-1]), mid=outputs[-1])

    def _executor(self, tensors: Tree, x: Tensor, call: Tensor) -> list[Tensor]:
        emb = pick(tensors["emb"], call)[0]
        h, skips = encode_unet(self.net, x.to(self.net.dtype), emb, tensors["context"], hint=tensors["hint"])
        convolutions = [*self.net.controlnet_down_blocks, self.net.controlnet_mid_block]
        return [conv(value) for conv, value in zip(convolutions, [*skips, h], strict=True)]

    def _peer(self, tensors: Tree, x: Tensor, call: Tensor) -> list[Tensor]:
        skips, mid = self.net(
            x.to(self.net.dtype),
            pick(tensors["timesteps"], call),
            encoder_hidden_states=tensors["prompt_embeds"],
            controlnet_cond=tensors["image"],
            added_cond_kwargs=added_conditions(tensors) or None,
            return_dict=False,
        )
        return [*skips, mid]


@dataclass
class EncodedControlNet(EncodedControl):
    """`image` and `hint` have a row for each picture; `hint` is the control image's embedding inside the network. `base` is
    the UNet, whose text the network sees."""

    injection: RunControlNet
    base: Net = None
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    hint: Tensor | None = None
    weights: tuple[Tensor, ...] = ()

    def show(self, image: Tensor) -> None:
        """Replaces the control image, (B, C, H, W) in [0, 1] or with both halves of the guidance batch."""
        self.image = image[-len(self.image) :].to(self.image)
        if self.hint is not None:
            self.hint = embed(self.injection.net, self.image)

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        if self.injection.half:
            conditioning, branches = conditional(conditioning, len(self.image)), 1
        conditioning = {**conditioning, "prompt_embeds": text_states(self.base, conditioning)}
        weights = tuple(in_every(weight, branches) if len(weight) > 1 else weight for weight in self.weights)
        if self.hint is not None:
            prepared = prepare_embeddings(self.injection.net, self.timesteps, conditioning)
            return {**prepared, "hint": in_every(self.hint, branches), "weights": weights}
        states: dict[str, Any] = {
            k: v.to(self.image.dtype) if k == "prompt_embeds" else v for k, v in conditioning.items()
        }
        image = in_every(self.image, branches)
        return {**states, "timesteps": self.timesteps, "image": image, "weights": weights}


def encode(control: Control, site: Site) -> EncodedControl:
    """Embeds the control image once; what follows in a step is the encoder and its output convolutions."""
    net = control.model
    _check_fit(net, site)
    net.to(site.device)
    own_forward = obstacle(net) is not None
    pixels = picture_tensor(control.image, site.height, site.width, channels=net.config.get("conditioning_channels", 3))
    pixels = pixels.to(site.device, net.dtype)
    hint = None if own_forward else spread(embed(net, pixels), site.prompts, site.per_prompt, "a control's image")
    image = spread(pixels, site.prompts, site.per_prompt, "a control's image")
    pooled = net.config.global_pool_conditions
    places, _ = layout(site.unet, site.latent_size)
    fades = fading(len(places), "balanced" if pooled else control.mode)
    weights = site.weights(control, fades, range(len(places)), control.level_scales(site.levels))
    return EncodedControlNet(
        injection=RunControlNet(net, pooled or control.mode != "balanced", own_forward),
        window=(control.start, control.end),
        nets=[] if own_forward else [net],
        base=site.unet,
        timesteps=site.timesteps,
        image=image,
        hint=hint,
        weights=tuple(weight.to(net.dtype) for weight in weights),
    )


@torch.no_grad()
def embed(net: Net, pixels: Tensor) -> Tensor:
    """The control image's embedding (N, C, h, w), which is added after the network's first convolution."""
    flipped = net.config.controlnet_conditioning_channel_order == "bgr"
    return net.controlnet_cond_embedding(pixels.flip(1) if flipped else pixels)


def _check_fit(net: Net, site: Site) -> None:
    has, takes = ([p[1] for p in layout(n, site.latent_size)[0]] for n in (net, site.unet))
    if has != takes:
        raise ValueError(
            f"this ControlNet does not fit the base: its residuals have {has} channels, the UNet takes {takes}"
        )
    width, base_width = net.config.cross_attention_dim, site.unet.config.cross_attention_dim
    if width != base_width:
        raise ValueError(
            f"this ControlNet does not fit the base: it reads text of width {width}, the base's is {base_width}"
        )
    downscale = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    if (site.height // downscale, site.width // downscale) != site.latent_size:
        raise ValueError(
            f"this ControlNet does not fit the base: it scales its image down by {downscale}, "
            f"the base {site.height} x {site.width} pixels to {site.latent_size[0]} x {site.latent_size[1]}"
        )
