"""Hint: the control image of a UNet that embeds one and takes it as extra input channels, as Kandinsky 2.2's ControlNet
does. `Control("hint", depth_map)` where that is the base's own UNet; `Control(unet, depth_map)` beside a plain decoder,
in whose place the UNet then denoises."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffusion_kit.models.denoiser import takes_hint
from diffusion_kit.models.unet import obstacle
from diffusion_kit.sampling.doors import Answer, Conditioning, Tree, in_every, spread

from .control import Control, EncodedControl, Site, bring
from .pictures import picture_tensor

MODELS = (UNet2DConditionModel,)
NAME = "hint"


@dataclass(frozen=True)
class AddChannels:
    """The same channels in every step."""

    executed = ()

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        return Answer(channels=tensors)


@dataclass
class EncodedChannels(EncodedControl):
    channels: Tensor = field(default_factory=lambda: torch.empty(0))

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        """In every branch, or in all but the first where the control has a guidance of its own."""
        if self.guidance is None or branches == 1:
            return in_every(self.channels, branches)
        return torch.cat([torch.zeros_like(self.channels), in_every(self.channels, branches - 1)])


@torch.no_grad()
def encode(control: Control, site: Site) -> EncodedControl:
    """Embeds the hint once: scale x mask x embedding, (rows, 4, h, w).

    Raises:
        ValueError: a base that takes no hint; a mode or a scale for each level, which a hint does not have.
    """
    net = site.unet
    if not takes_hint(net):
        raise ValueError("this base takes no hint: only a UNet with addition_embed_type 'image_hint' does")
    if control.mode != "balanced":
        raise ValueError(f"Control mode is {control.mode!r}; a hint has no residuals: it must be 'balanced'")
    weight = site.weights(control, [1.0], [0], control.level_scales(1))[0]
    hint = picture_tensor(control.image, site.height, site.width).to(site.device, net.dtype)
    if obstacle(net) is None:
        bring(net, site.device)
        hint = net.add_embedding.input_hint_block(hint)
        if hint.shape[-2:] != site.latent_size:
            made, needed = (" x ".join(map(str, size)) for size in (hint.shape[-2:], site.latent_size))
            raise ValueError(f"the UNet makes {made} of a hint, its latents are {needed}")
        hint = weight.to(hint) * spread(hint, site.prompts, site.per_prompt, "a hint")
    elif (control.scale, control.start, control.end, control.mask) != (1.0, 0.0, 1.0, None):
        raise ValueError(
            f"the UNet runs through its own forward ({obstacle(net)}), which takes a hint without scale, window and mask"
        )
    else:
        hint = spread(hint, site.prompts, site.per_prompt, "a hint")
    return EncodedChannels(AddChannels(), (control.start, control.end), channels=hint)
