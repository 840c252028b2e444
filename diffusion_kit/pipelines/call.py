"""The arguments of one call, as every family over a UNet and an autoencoder takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from diffusion_kit.adapters.control import Control
from diffusion_kit.adapters.pictures import FITS
from diffusion_kit.sampling.schedule import Schedule

ONE = "controls is one Control; it must be a list of them"


@dataclass(frozen=True)
class LateControls:
    """Controls that are made when the number of steps is known, and the call's `more` beside them."""

    make: Callable[[Schedule], Sequence[Control]]
    more: Sequence[Control] = ()

    def beside(self, others: Sequence[Control]) -> LateControls:
        return replace(self, more=[*self.more, *others])

    def __call__(self, schedule: Schedule) -> list[Control]:
        return [*self.make(schedule), *self.more]


def listed(controls: Any) -> list[Control]:
    """
    Raises:
        ValueError: it is a single control.
    """
    if isinstance(controls, Control):
        raise ValueError(ONE)
    return list(controls)


@dataclass
class LatentCall:
    """Makes pictures: text-to-image; image-to-image where `image` is given; inpainting where `mask_image` is given too.

    Attributes:
        prompt: text, or one for each picture of the batch.
        image: a picture (PIL, array in [0, 1], tensor (N, 3, H, W) in [0, 1], or latents (N, 4, h, w)), or one a prompt.
        mask_image: greyscale, white is repainted.
        controls: `Control` values; image k and mask k of a control belong to prompt k.
        fit: how PIL pictures of another shape than the result are brought to it: "stretch" as diffusers does, "cover"
            (scaled and cut around the middle) or "contain" (whole, with black bars).
        strength: share of the steps that image-to-image and inpainting run, in [0, 1]; see `strengths` for the defaults.
        height, width: of the result in pixels; by default the picture's, or what the model was made for. Rounded, with a
            warning, to what the networks divide.
        num_inference_steps, timesteps, sigmas: the schedule, or custom values for it.
        denoising_start, denoising_end: hand-over between two models, as fractions of the noise schedule.
        guidance_scale: w of classifier-free guidance, off at 1.
        guidance_interval: fractions of the steps with guidance.
        guidance_rescale: phi of arXiv 2305.08891, section 3.4.
        negative_prompt: what guidance leads away from.
        generator: one, or one for each picture, which then is the same alone and in a batch.
        latents: noise to start from, (B, 4, h, w).
        padding_mask_crop: margin in pixels: only the masked region is worked on, at full size, and pasted back.
        output_type: "pil", "np", "pt" or "latent".
        callback_on_step_end: called as (pipe, call, timestep, tensors) after each call of the network; it gets the tensors
            named in `callback_on_step_end_tensor_inputs` ("preview" is a small picture (B, 3, h, w) in [0, 1]) and may
            return others; `pipe._interrupt = True` stops, `pipe._guidance_scale` changes guidance.

    Returns:
        An output with `images`, or a tuple where `return_dict=False`.

    Raises:
        TypeError: an unknown argument. ValueError: a value that is out of range or does not fit.
    """

    strengths: ClassVar[tuple[float, float]]  # of image-to-image and of inpainting, where none is given

    prompt: Any = None
    image: Any = None
    mask_image: Any = None
    controls: Any = ()
    fit: str = "stretch"
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    negative_prompt: Any = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Any = None
    latents: Tensor | None = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None
    output_type: str = "pil"
    return_dict: bool = True
    cross_attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: Any = None
    callback_on_step_end_tensor_inputs: Sequence[str] = field(default_factory=lambda: ["latents"])
    callback: Callable[[int, Tensor, Tensor], None] | None = None
    callback_steps: int | None = 1

    @property
    def share(self) -> float:
        """Strength, by the task where it was not given."""
        return self.strengths[self.mask_image is not None] if self.strength is None else self.strength

    @property
    def prompts(self) -> int:
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    def check(self, tensors: Sequence[str]) -> None:
        """Raises one clear line for what cannot be right; `tensors` are those that callbacks may ask for."""
        for wrong, message in self.rules(tensors):
            if wrong:
                raise ValueError(message)

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        """What is wrong, and the line that says so."""
        is_text = isinstance(self.prompt, str) or (isinstance(self.prompt, (list, tuple)) and len(self.prompt) > 0)
        low, high = self.guidance_interval
        count, start, end = self.num_images_per_prompt, self.denoising_start, self.denoising_end
        unknown = sorted(set(self.callback_on_step_end_tensor_inputs) - set(tensors))
        return [
            (self.image is None and self.mask_image is not None, "mask_image needs an image to repaint"),
            (
                self.prompt is not None and not is_text,
                f"prompt is {self.prompt!r}; it must be text or a list of texts",
            ),
            (isinstance(self.controls, Control), ONE),
            (self.fit not in FITS, f"fit is {self.fit!r}; it must be one of {', '.join(FITS)}"),
            (
                self.padding_mask_crop is not None and self.output_type != "pil",
                "padding_mask_crop pastes into the picture: it needs output_type='pil'",
            ),
            (not 0 <= low <= high <= 1, f"guidance_interval is {low} to {high}; it must be 0 <= start <= end <= 1"),
            (not isinstance(count, int) or count < 1, f"num_images_per_prompt is {count}; it must be 1 or more"),
            (
                not math.isfinite(self.guidance_scale),
                f"guidance_scale is {self.guidance_scale}; it must be a finite number",
            ),
            (
                start is not None and (end or 1.0) <= start,
                f"denoising_start {start} must lie before denoising_end {end}",
            ),
            (bool(unknown), f"callback tensors {unknown} are unknown; there are {list(tensors)}"),
        ]


@dataclass
class EmbedsCall(LatentCall):
    __doc__ = f"""{LatentCall.__doc__}
    Of families that take text as embeddings too:
        prompt_embeds, negative_prompt_embeds: ready embeddings in place of prompts, as `encode_prompt` returns them.
    """

    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None

    @property
    def prompts(self) -> int:
        return super().prompts if self.prompt_embeds is None else len(self.prompt_embeds)

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        return [
            *super().rules(tensors),
            ((self.prompt is None) == (self.prompt_embeds is None), "give a prompt or prompt_embeds, one of the two"),
            (
                self.negative_prompt is not None and self.negative_prompt_embeds is not None,
                "give a negative_prompt or negative_prompt_embeds, one of the two",
            ),
        ]


@dataclass
class TextCall(EmbedsCall):
    __doc__ = f"""{EmbedsCall.__doc__}
    Of families with CLIP's text encoders:
        ip_adapter_image, ip_adapter_image_embeds: pictures for the adapters of `load_ip_adapter`, a list with one for each
            (several pictures that act together are a list themselves), or their embeddings; see `adapters.ip_adapter`.
        prompt_syntax: "weighted" reads (word:1.3) and prompts of any length (see `models.text`); None takes text as it is.
        clip_skip: layers of the text encoders to leave out at the end.
    """

    ip_adapter_image: Any = None
    ip_adapter_image_embeds: Any = None
    prompt_syntax: str | None = None
    clip_skip: int | None = None

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        syntax = self.prompt_syntax
        return [
            *super().rules(tensors),
            (
                self.ip_adapter_image is not None and self.ip_adapter_image_embeds is not None,
                "give ip_adapter_image or ip_adapter_image_embeds, one of the two",
            ),
            (syntax not in (None, "weighted"), f"prompt_syntax is {syntax!r}; it must be 'weighted' or None"),
        ]
