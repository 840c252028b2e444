"""Where the latents of a run start: from noise, from a picture, or from a picture with a mask.

Random numbers are drawn in the peer's order (posterior of the picture, noise, posterior of the masked picture), each
picture's from its own generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_kit.sampling.doors import KeepUnmasked, LatentRule, spread
from diffusion_kit.sampling.noise import Generators, draw
from diffusion_kit.sampling.schedule import Schedule


@dataclass
class Start:
    """latents (B, C, h, w); extra channels for the UNet and the rule for the latents, where the task has them."""

    latents: Tensor
    channels: Tensor | None = None
    rule: tuple[LatentRule, dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Batch:
    """How many pictures, of what latent shape, with whose noise."""

    prompts: int
    per_prompt: int
    shape: tuple[int, int, int]
    generator: Generators
    device: torch.device
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.prompts * self.per_prompt

    def noise(self) -> Tensor:
        return draw((self.size, *self.shape), self.generator, self.device, self.dtype)

    def spread(self, values: Tensor, what: str) -> Tensor:
        return spread(values, self.prompts, self.per_prompt, what)

    def encode(self, pixels: Tensor, encoder: Callable[[Tensor, Generators], Tensor], what: str) -> Tensor:
        """Latents for every picture; with a generator each, every picture's own draw from the posterior."""
        if isinstance(self.generator, (list, tuple)):
            return encoder(self.spread(pixels, what), self.generator)
        return self.spread(encoder(pixels, self.generator), what)


Encoder = Callable[[Tensor, Generators], Tensor]


def from_noise(batch: Batch, schedule: Schedule, latents: Tensor | None) -> Start:
    """Standard normal noise, or the caller's, times the schedule's first standard deviation."""
    noise = batch.noise() if latents is None else _given(latents, batch)
    return Start(noise * schedule.init_scale)


def from_picture(
    batch: Batch, schedule: Schedule, picture: Tensor, encoder: Encoder, *, add_noise: bool, latents: Tensor | None
) -> Start:
    """Image-to-image: the picture (N, 3, H, W) in [-1, 1], or its latents, at the first call's noise level.

    `add_noise=False` takes latents that another run left half-way.
    """
    if latents is not None:
        return Start(_given(latents, batch))
    image = _latents_of(batch, picture, encoder)
    return Start(_noised(schedule, image, batch.noise()) if add_noise else image)


def from_masked_picture(
    batch: Batch,
    schedule: Schedule,
    picture: Tensor,
    mask: Tensor,
    encoder: Encoder,
    *,
    unet_channels: int,
    strength: float,
    add_noise: bool,
    latents: Tensor | None,
    masked_latents: Tensor | None,
) -> Start:
    """Inpainting: white of the mask (N, 1, H, W), 0 or 1, is repainted.

    A UNet with as many input channels as the latents keeps the rest by blending after every step; one with 2 C + 1 sees
    the mask and the masked picture's latents as extra channels.

    Raises:
        ValueError: a UNet of other input channels.
    """
    channels = batch.shape[0]
    blends, sees = unet_channels == channels, unet_channels == 2 * channels + 1
    if not blends and not sees:
        raise ValueError(
            f"inpainting needs a UNet of {channels} or {2 * channels + 1} input channels, not {unet_channels}"
        )
    whole = strength == 1.0
    image = None
    if blends or (latents is None and not whole) or not add_noise:
        image = _latents_of(batch, picture, encoder)
    noise = batch.noise() if latents is None or not add_noise else _given(latents, batch)
    if not add_noise:
        start = image
    elif whole or latents is not None:
        start = noise * schedule.init_scale
    else:
        start = _noised(schedule, image, noise)  # type: ignore[arg-type]
    masked = _masked_latents(batch, picture, mask, encoder, masked_latents, needed=sees)
    small = batch.spread(F.interpolate(mask, batch.shape[1:]), "mask_image").to(batch.device)
    if sees:
        return Start(start, channels=torch.cat([small.to(masked), masked], 1))  # type: ignore[arg-type, list-item]
    tensors = {"image": image.float(), "noise": noise.float(), "mask": small.float()}  # type: ignore[union-attr]
    return Start(start, rule=(KeepUnmasked(), {**tensors, "noise_level": schedule.noise_level}))  # type: ignore[arg-type]


def _masked_latents(
    batch: Batch, picture: Tensor, mask: Tensor, encoder: Encoder, given: Tensor | None, *, needed: bool
) -> Tensor | None:
    """Latents of the picture without what the mask hides. Where nobody needs them the peer still draws their posterior, so
    the same numbers are drawn and thrown away."""
    if given is not None:
        return batch.spread(given.to(batch.device, batch.dtype), "masked_image_latents")
    if picture.shape[1] == batch.shape[0]:
        return None
    if needed:
        return batch.encode(picture * (mask < 0.5), encoder, "image").to(batch.dtype)
    several = isinstance(batch.generator, (list, tuple))
    draw((batch.size if several else len(picture), *batch.shape), batch.generator, batch.device, batch.dtype)
    return None


def _latents_of(batch: Batch, picture: Tensor, encoder: Encoder) -> Tensor:
    if picture.shape[1] == batch.shape[0]:  # latents already
        return batch.spread(picture.to(batch.device, batch.dtype), "image")
    return batch.encode(picture, encoder, "image")


def _noised(schedule: Schedule, image: Tensor, noise: Tensor) -> Tensor:
    if not hasattr(schedule.scheduler, "add_noise"):
        raise ValueError(f"{type(schedule.scheduler).__name__} cannot start from a picture: it has no add_noise")
    a, b = schedule.noise_level[0].unbind(-1)
    return a * image + b * noise


def _given(latents: Tensor, batch: Batch) -> Tensor:
    if tuple(latents.shape) != (batch.size, *batch.shape):
        raise ValueError(f"latents have shape {tuple(latents.shape)}; this call needs {(batch.size, *batch.shape)}")
    return latents.to(batch.device)
