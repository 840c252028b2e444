"""Where the latents of a run start: from noise, from a picture, or from a picture with a mask.

Random numbers are drawn in the peer's order (posterior of the picture, noise, posterior of the masked picture), each
picture's from its own generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_kit.sampling.doors import KeepUnmasked, LatentRule, spread
from diffusion_kit.sampling.noise import Generators, draw
from diffusion_kit.sampling.schedule import Schedule

from .call import LatentCall
from .canvas import Canvas


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
    batch: Batch,
    schedule: Schedule,
    picture: Tensor,
    encoder: Encoder,
    *,
    add_noise: bool,
    latents: Tensor | None,
    level: tuple[float, float] | None = None,
) -> Start:
    """Image-to-image: the picture (N, 3, H, W) in [-1, 1], or its latents, at the first call's noise level, or at `level`:
    a and b of a image + b noise.

    `add_noise=False` takes latents that another run left half-way.
    """
    if latents is not None:
        return Start(_given(latents, batch))
    image = _latents_of(batch, picture, encoder)
    if not add_noise:
        return Start(image)
    if level is None:
        return Start(_noised(schedule, image, batch.noise()))
    return Start(level[0] * image + level[1] * batch.noise())


def from_masked_picture(
    call: LatentCall, batch: Batch, schedule: Schedule, canvas: Canvas, encoder: Encoder, unet_channels: int
) -> Start:
    """Inpainting: white of the canvas's mask is repainted.

    A UNet with as many input channels as the latents keeps the rest by blending after every step; one with 2 C + 1 sees
    the mask and the masked picture's latents as extra channels.

    Raises:
        ValueError: a UNet of other input channels.
    """
    channels = batch.shape[0]
    picture, mask, add_noise = canvas.picture, canvas.mask, call.denoising_start is None
    image: Any = None
    blends, sees = unet_channels == channels, unet_channels == 2 * channels + 1
    if not blends and not sees:
        raise ValueError(
            f"inpainting needs a UNet of {channels} or {2 * channels + 1} input channels, not {unet_channels}"
        )
    if blends or not _whole(call) or not add_noise:
        image = _latents_of(batch, picture, encoder)
    noise = batch.noise() if call.latents is None or not add_noise else _given(call.latents, batch)
    start = _started(call, schedule, image, noise)
    masked = _masked_latents(batch, picture, mask, encoder, call.masked_image_latents, needed=sees)
    small = batch.spread(F.interpolate(mask, batch.shape[1:]), "mask_image").to(batch.device)
    if sees:
        return Start(start, channels=torch.cat([small.to(masked), masked], 1))
    tensors = {"image": image.float(), "noise": noise.float(), "mask": small.float()}
    return Start(start, rule=(KeepUnmasked(), {**tensors, "noise_level": schedule.noise_level}))


def from_worn_picture(
    call: LatentCall, batch: Batch, schedule: Schedule, canvas: Canvas, encoder: Encoder, *, blends: bool
) -> Start:
    """Inpainting as Kandinsky 2.x was trained for it: (picture's latents x kept, kept) are extra channels, where kept is
    worn away by a latent around white of the mask (N, 1, H, W), 0 or 1. Kandinsky 2.2 also `blends` after every step.
    """
    image = _latents_of(batch, canvas.picture, encoder)
    noise = batch.noise() if call.latents is None else _given(call.latents, batch)
    start = _started(call, schedule, image, noise)
    hole = batch.spread(grown(F.interpolate(canvas.mask, batch.shape[1:])), "mask_image").to(image)
    channels = torch.cat([image * (1 - hole), 1 - hole], 1)
    tensors = {
        "image": image.float(),
        "noise": noise.float(),
        "mask": hole.float(),
        "noise_level": schedule.noise_level,
    }
    return Start(start, channels, (KeepUnmasked(), tensors) if blends else None)


def _whole(call: LatentCall) -> bool:
    """Whether inpainting starts from noise only."""
    return call.share == 1.0 or call.latents is not None


def _started(call: LatentCall, schedule: Schedule, image: Any, noise: Tensor) -> Tensor:
    """Where inpainting starts: at what another run left, at noise, or at the noised picture."""
    if call.denoising_start is not None:
        return image
    return noise * schedule.init_scale if _whole(call) else _noised(schedule, image, noise)


def grown(hole: Tensor) -> Tensor:
    """(N, 1, h, w) of 0 and 1 with the ones grown to their neighbours but for the upper right and the lower left one."""
    forward = F.max_pool2d(F.pad(hole, (0, 1, 0, 1)), 2, 1)
    backward = F.max_pool2d(F.pad(hole, (1, 0, 1, 0)), 2, 1)
    return torch.maximum(forward, backward)


def _masked_latents(
    batch: Batch, picture: Any, mask: Any, encoder: Encoder, given: Tensor | None, *, needed: bool
) -> Any:
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


def _latents_of(batch: Batch, picture: Any, encoder: Encoder) -> Any:
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
