"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): base and refiner, three tasks, any controls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusion_kit.adapters.control import Control, Site
from diffusion_kit.adapters.pictures import eight_bit
from diffusion_kit.models.denoiser import make_denoiser
from diffusion_kit.models.text import Text, count_windows, encode_text, encode_weighted
from diffusion_kit.models.vae import encode_picture, scale_factor
from diffusion_kit.sampling.guidance import guidance_embedding
from diffusion_kit.sampling.loop import Run
from diffusion_kit.sampling.schedule import Schedule, make_schedule

from .base import ControlledPipeline
from .starts import Batch, Start, from_masked_picture, from_noise, from_picture, mask_processor

Size = tuple[int, int]


@dataclass
class SDXLCall:
    """Makes pictures: text-to-image; image-to-image where `image` is given; inpainting where `mask_image` is given too.

    Attributes:
        prompt, prompt_2: text, or one for each picture of the batch; the second for the second encoder.
        image: a picture (PIL, array in [0, 1], tensor (N, 3, H, W) in [0, 1], or latents (N, 4, h, w)), or one a prompt.
        mask_image: greyscale, white is repainted.
        controls: `Control` values; image k and mask k of a control belong to prompt k.
        strength: share of the steps that image-to-image (0.3 if not given) and inpainting (0.9999) run, in [0, 1].
        height, width: of the result in pixels, multiples of 8; by default the picture's, or what the model was made for.
        num_inference_steps, timesteps, sigmas: the schedule, or custom values for it.
        denoising_start, denoising_end: hand-over between base and refiner, as fractions of the noise schedule.
        guidance_scale: w of classifier-free guidance, off at 1. guidance_interval: fractions of the steps with guidance.
        guidance_rescale: phi of arXiv 2305.08891, section 3.4.
        negative_prompt, negative_prompt_2: what guidance leads away from; none is the zero embedding of SDXL's base.
        generator: one, or one for each picture, which then is the same alone and in a batch.
        latents: noise to start from, (B, 4, h, w).
        prompt_embeds, ...: ready embeddings in place of prompts, as `encode_prompt` returns them.
        prompt_syntax: "weighted" reads (word:1.3) and prompts of any length (see `models.text`); None takes text as it is.
        original_size, crops_coords_top_left, target_size, aesthetic_score: SDXL's micro-conditioning.
        clip_skip: layers of the text encoders to leave out at the end.
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

    prompt: Any = None
    prompt_2: Any = None
    image: Any = None
    mask_image: Any = None
    controls: Any = ()
    strength: float | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    guidance_scale: float = 5.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    negative_prompt: Any = None
    negative_prompt_2: Any = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Any = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: Any = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None
    output_type: str = "pil"
    return_dict: bool = True
    cross_attention_kwargs: dict[str, Any] | None = None
    prompt_syntax: str | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    clip_skip: int | None = None
    callback_on_step_end: Any = None
    callback_on_step_end_tensor_inputs: Sequence[str] = field(default_factory=lambda: ["latents"])
    callback: Callable[[int, Tensor, Tensor], None] | None = None
    callback_steps: int | None = 1

    @property
    def share(self) -> float:
        """Strength, by the task where it was not given."""
        if self.strength is not None:
            return self.strength
        return 0.3 if self.mask_image is None else 0.9999

    @property
    def prompts(self) -> int:
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt)


class Canvas(NamedTuple):
    """Size of the result and what it is painted over.

    Attributes:
        picture: (N, 3, H, W) in [-1, 1], or latents (N, 4, h, w). mask: (N, 1, H, W) of 0 and 1.
        crop: box of the picture that `padding_mask_crop` works on.
    """

    height: int
    width: int
    picture: Tensor | None = None
    mask: Tensor | None = None
    crop: tuple[int, int, int, int] | None = None

    def latent_size(self, factor: int) -> tuple[int, int]:
        return self.height // factor, self.width // factor

    def into_crop(self, control: Control, whole: Image.Image) -> Control:
        """The control with its pictures and masks cut to the region that is worked on, as the picture `whole` is."""

        def cut(pictures: Any) -> Any:
            if isinstance(pictures, (list, tuple)):
                return [cut(picture) for picture in pictures]
            if not isinstance(pictures, Image.Image):
                raise ValueError("padding_mask_crop needs PIL pictures, in controls too")
            region = eight_bit(pictures).resize(whole.size, Image.Resampling.LANCZOS).crop(self.crop)
            return VaeImageProcessor()._resize_and_fill(region, self.width, self.height)

        return replace(control, image=cut(control.image), mask=None if control.mask is None else cut(control.mask))


class SDXLPipeline(
    ControlledPipeline,
    StableDiffusionMixin,
    FromSingleFileMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
):
    """The SDXL family: see `SDXLCall` for its one call, and the peer for loading, LoRA, offloading and saving."""

    Call = SDXLCall
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = [
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
        "feature_extractor",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "add_text_embeds",
        "negative_pooled_prompt_embeds",
        "add_time_ids",
        "negative_add_time_ids",
        "add_neg_time_ids",
        "image",
        "control_image",
        "mask",
        "masked_image_latents",
        "preview",
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        if requires_aesthetics_score:
            self.register_to_config(requires_aesthetics_score=True)
        self.vae_scale_factor = scale_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.default_sample_size = unet.config.sample_size if unet is not None else 128
        self.watermark = _watermark(add_watermarker)
        self._guidance_scale, self._guidance_rescale = 5.0, 0.0
        self._clip_skip: int | None = None
        self._interrupt, self._num_timesteps = False, 0
        self._cross_attention_kwargs: dict[str, Any] | None = None
        self._denoising_start: float | None = None
        self._denoising_end: float | None = None

    @property
    def peer_name(self) -> str:  # type: ignore[override]
        return "StableDiffusionXLImg2ImgPipeline" if self.scores_aesthetics else "StableDiffusionXLPipeline"

    @property
    def scores_aesthetics(self) -> bool:
        return bool(self.config.get("requires_aesthetics_score"))

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def denoising_end(self) -> float | None:
        return self._denoising_end

    @property
    def denoising_start(self) -> float | None:
        return self._denoising_start

    # The call

    def generate(self, call: SDXLCall) -> Any:
        self._check(call)
        canvas = self._canvas(call)
        self._remember(call)
        device = self._execution_device
        conditioning = self._conditioning(call, canvas, device)
        schedule = self._schedule(call, device)
        batch = Batch(
            call.prompts,
            call.num_images_per_prompt,
            (self.vae.config.latent_channels, *canvas.latent_size(self.vae_scale_factor)),
            call.generator,
            device,
            self.unet.dtype,
        )
        start = self._start(call, batch, schedule, canvas)
        site = Site(
            self.unet,
            canvas.height,
            canvas.width,
            batch.shape[1:],
            batch.prompts,
            batch.per_prompt,
            schedule.timesteps,
            device,
        )
        controls = call.controls(schedule) if callable(call.controls) else call.controls
        if canvas.crop is not None:
            controls = [canvas.into_crop(control, call.image) for control in controls]
        run = Run(
            schedule=schedule,
            denoiser=make_denoiser(self.unet, batch.shape[0], call.cross_attention_kwargs),
            conditioning=conditioning,
            controls=self.encode_controls(controls, site),
            channels=start.channels,
            rule=start.rule,
            guidance_scale=self._guidance_scale if self.do_classifier_free_guidance else 1.0,
            guidance_rescale=call.guidance_rescale,
            guidance_interval=call.guidance_interval,
            generator=call.generator,
            engine=self.engine,
            dtype=self.unet.dtype,
        )
        latents = self.denoise(run, start.latents, _Callbacks(self, call, run)).to(self.unet.dtype)
        images = self.decode(latents, call.output_type)
        if canvas.crop is not None:
            overlay = self.image_processor.apply_overlay
            images = [overlay(call.mask_image, call.image, image, canvas.crop) for image in images]
        self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=images) if call.return_dict else (images,)

    def _remember(self, call: SDXLCall) -> None:
        """What callbacks read and write on the pipeline."""
        self._guidance_scale, self._guidance_rescale = call.guidance_scale, call.guidance_rescale
        self._clip_skip, self._cross_attention_kwargs = call.clip_skip, call.cross_attention_kwargs
        self._denoising_start, self._denoising_end = call.denoising_start, call.denoising_end
        self._interrupt = False

    def _schedule(self, call: SDXLCall, device: torch.device) -> Schedule:
        schedule = make_schedule(
            self.scheduler,
            call.num_inference_steps,
            timesteps=call.timesteps,
            sigmas=call.sigmas,
            strength=None if call.image is None else call.share,
            denoising_start=call.denoising_start,
            denoising_end=call.denoising_end,
            eta=call.eta,
            device=device,
        )
        self._num_timesteps = schedule.calls
        return schedule

    def _start(self, call: SDXLCall, batch: Batch, schedule: Schedule, canvas: Canvas) -> Start:
        def encoder(pixels: Tensor, generator: Any) -> Tensor:
            return encode_picture(self.vae, pixels.to(batch.device), generator, batch.dtype)

        add_noise = call.denoising_start is None
        if canvas.picture is None:
            return from_noise(batch, schedule, call.latents)
        if canvas.mask is None:
            return from_picture(batch, schedule, canvas.picture, encoder, add_noise=add_noise, latents=call.latents)
        return from_masked_picture(
            batch,
            schedule,
            canvas.picture,
            canvas.mask,
            encoder,
            unet_channels=self.unet.config.in_channels,
            strength=call.share,
            add_noise=add_noise,
            latents=call.latents,
            masked_latents=call.masked_image_latents,
        )

    # Pictures and sizes

    def _canvas(self, call: SDXLCall) -> Canvas:
        """The call's pictures as tensors of one size."""
        factor = self.vae_scale_factor
        native = self.default_sample_size * factor
        if call.height is not None or call.width is not None:
            _check_size(call.height or native, call.width or native, factor)
        if call.image is None:
            return Canvas(call.height or native, call.width or native)
        height, width, crop = call.height, call.width, None
        options: dict[str, Any] = {}
        if call.padding_mask_crop is not None and call.mask_image is not None:
            if not all(isinstance(one, Image.Image) for one in (call.image, call.mask_image)) or call.output_type != "pil":
                raise ValueError("padding_mask_crop needs one PIL image, one PIL mask and output_type='pil'")
            height, width = height or native, width or native
            crop = self.image_processor.get_crop_region(call.mask_image, width, height, pad=call.padding_mask_crop)
            options = {"crops_coords": crop, "resize_mode": "fill"}
        picture = self.image_processor.preprocess(_plain(call.image), height=height, width=width, **options)
        scale = factor if picture.shape[1] == self.vae.config.latent_channels else 1
        height, width = picture.shape[-2] * scale, picture.shape[-1] * scale
        if call.mask_image is None:
            return Canvas(height, width, picture)
        masks = mask_processor(self.image_processor)
        mask = masks.preprocess(_plain(call.mask_image), height=height, width=width, **options)
        return Canvas(height, width, picture, mask, crop)

    def _check(self, call: SDXLCall) -> None:
        """Raises one clear line for what cannot be right."""
        if call.ip_adapter_image is not None or call.ip_adapter_image_embeds is not None:
            raise ValueError("ip_adapter_image is not supported yet: image prompts are no control of this version")
        if call.image is None and call.mask_image is not None:
            raise ValueError("mask_image needs an image to repaint")
        if (call.prompt is None) == (call.prompt_embeds is None):
            raise ValueError("give a prompt or prompt_embeds, one of the two")
        texts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
        if call.prompt is not None and (not isinstance(texts, (list, tuple)) or not texts):
            raise ValueError(f"prompt is {call.prompt!r}; it must be text or a list of texts")
        if isinstance(call.controls, Control):
            raise ValueError("controls is one Control; it must be a list of them")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if getattr(call, name) is not None and getattr(call, pooled) is None:
                raise ValueError(f"{name} need {pooled} from the same text encoder")
        if call.negative_prompt is not None and call.negative_prompt_embeds is not None:
            raise ValueError("give a negative_prompt or negative_prompt_embeds, one of the two")
        low, high = call.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {low} to {high}; it must be 0 <= start <= end <= 1")
        if not isinstance(call.num_images_per_prompt, int) or call.num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {call.num_images_per_prompt}; it must be 1 or more")
        if call.prompt_syntax not in (None, "weighted"):
            raise ValueError(f"prompt_syntax is {call.prompt_syntax!r}; it must be 'weighted' or None")
        if not math.isfinite(call.guidance_scale):
            raise ValueError(f"guidance_scale is {call.guidance_scale}; it must be a finite number")
        if call.denoising_start is not None and (call.denoising_end or 1.0) <= call.denoising_start:
            raise ValueError(f"denoising_start {call.denoising_start} must lie before denoising_end {call.denoising_end}")
        unknown = set(call.callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callback tensors {sorted(unknown)} are unknown; there are {self._callback_tensor_inputs}")

    # Text and sizes as conditioning

    def _conditioning(self, call: SDXLCall, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        """(unconditional, conditional) embeddings along the batch, or the conditional ones without guidance."""
        guided = self.do_classifier_free_guidance
        prompt, negative, pooled, negative_pooled = self.encode_prompt(
            call.prompt,
            call.prompt_2,
            device,
            call.num_images_per_prompt,
            guided,
            call.negative_prompt,
            call.negative_prompt_2,
            prompt_embeds=call.prompt_embeds,
            negative_prompt_embeds=call.negative_prompt_embeds,
            pooled_prompt_embeds=call.pooled_prompt_embeds,
            negative_pooled_prompt_embeds=call.negative_pooled_prompt_embeds,
            clip_skip=call.clip_skip,
            prompt_syntax=call.prompt_syntax,
        )
        ids, negative_ids = (values.expand(len(prompt), -1) for values in self._time_ids(call, canvas, prompt, pooled))
        conditioning = {"prompt_embeds": prompt, "add_text_embeds": pooled, "add_time_ids": ids}
        if guided:
            unconditional: dict[str, Any] = {
                "prompt_embeds": negative,
                "add_text_embeds": negative_pooled,
                "add_time_ids": negative_ids,
            }
            conditioning = {name: torch.cat([unconditional[name], conditioning[name]]) for name in conditioning}
        width = self.unet.config.time_cond_proj_dim
        if width is not None:
            scale = self._guidance_scale
            conditioning["timestep_cond"] = guidance_embedding(scale, width, len(prompt), device, self.unet.dtype)
        return {name: value.to(device) for name, value in conditioning.items()}

    def _time_ids(self, call: SDXLCall, canvas: Canvas, prompt: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Micro-conditioning (1, 6), or (1, 5) of the refiner, for the conditional and the unconditional half."""
        size = (canvas.height, canvas.width)
        original, target = call.original_size or size, call.target_size or size
        crops, negative_crops = call.crops_coords_top_left, call.negative_crops_coords_top_left
        negative_original = call.negative_original_size or original
        negative_target = call.negative_target_size or target
        given = call.negative_original_size is not None and call.negative_target_size is not None
        if self.scores_aesthetics:
            ids: tuple[float, ...] = (*original, *crops, call.aesthetic_score)
            negative: tuple[float, ...] = (*negative_original, *negative_crops, call.negative_aesthetic_score)
        else:
            ids = (*original, *crops, *target)
            if not any(negative_crops) and not (given and call.image is None):
                negative_crops = crops
            negative = (*negative_original, *negative_crops, *negative_target)
        takes = self.unet.add_embedding.linear_1.in_features
        gives = self.unet.config.addition_time_embed_dim * len(ids) + pooled.shape[-1]
        if takes != gives:
            raise ValueError(
                f"the UNet takes added embeddings of width {takes}, the call makes {gives}: "
                "is this a refiner without requires_aesthetics_score=True, or a base with it?"
            )
        dtype, device = prompt.dtype, prompt.device
        return tuple(torch.tensor([values], dtype=dtype).to(device) for values in (ids, negative))  # type: ignore[return-value]

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_syntax: str | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Text states (B, tokens, width) and pooled states (B, P): prompt, negative, pooled, negative pooled.

        B is prompts x num_images_per_prompt. The negative ones are None without guidance.
        """
        device = device or self._execution_device
        if lora_scale is not None:
            self._cross_attention_kwargs = {"scale": lora_scale}
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        weighted = prompt_syntax == "weighted" and prompt is not None
        windows = self._windows(prompt, prompt_2, negative_prompt, negative_prompt_2) if weighted else None
        with self._loras_scaled(*encoders):
            if prompt_embeds is None:
                pair = (prompt, prompt_2 or prompt)
                prompt_embeds, own_pooled = self._encode([_texts(own) for own in pair], clip_skip or 0, windows)
                pooled_prompt_embeds = own_pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
                    negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                    negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)  # type: ignore[arg-type]
                else:
                    pair = (negative_prompt or "", negative_prompt_2 or negative_prompt or "")
                    rows = [_texts(negative, len(prompt_embeds)) for negative in pair]
                    text = self._encode(rows, 0, windows, length=prompt_embeds.shape[1])
                    negative_prompt_embeds, negative_pooled_prompt_embeds = text
        dtype = self.text_encoder_2.dtype if self.text_encoder_2 is not None else self.unet.dtype

        def spread_out(values: Tensor | None, cast: bool) -> Tensor | None:
            if values is None or not num_images_per_prompt:
                return values
            values = values.to(device, dtype) if cast else values.to(device)
            return values.repeat_interleave(num_images_per_prompt, 0)

        negative = spread_out(negative_prompt_embeds if do_classifier_free_guidance else None, True)
        negative_pooled = spread_out(negative_pooled_prompt_embeds if do_classifier_free_guidance else None, False)
        states, pooled = spread_out(prompt_embeds, True), spread_out(pooled_prompt_embeds, False)
        return states, negative, pooled, negative_pooled  # type: ignore[return-value]

    def _encode(self, texts: Sequence[Sequence[str]], skip: int, windows: int | None, length: int | None = None) -> Text:
        """Both encoders' states side by side and the second's pooled state; `texts` has the first's and the second's."""
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        results = []
        for (tokenizer, encoder), own in zip(pairs, texts, strict=True):
            if encoder is None:
                continue
            own = [self.maybe_convert_prompt(text, tokenizer) for text in own]
            if windows is None:
                results.append(encode_text(own, tokenizer, encoder, skip=skip, length=length))
            else:
                results.append(encode_weighted(own, tokenizer, encoder, skip=skip, windows=windows))
        return Text(torch.cat([text.states for text in results], -1), results[-1].pooled)

    def _windows(self, *prompts: Any) -> int:
        """Windows of tokens that hold the longest of all prompts, so that every row has as many."""
        return count_windows([text for own in prompts for text in _texts(own or "")], self.tokenizer_2)


class _Callbacks:
    """After each call of the network: the caller's callbacks, what they changed, the progress bar."""

    def __init__(self, pipe: SDXLPipeline, call: SDXLCall, run: Run):
        self.pipe, self.call, self.run = pipe, call, run
        self.names = call.callback_on_step_end_tensor_inputs
        if isinstance(call.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.names = call.callback_on_step_end.tensor_inputs
        self.done = pipe.steps_bar(run.schedule)

    def __call__(self, k: int, before: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
        schedule = self.run.schedule
        t = schedule.timesteps[k]
        if self.call.callback_on_step_end is not None:
            given = {name: self._tensor(name, k, before, prediction, latents) for name in self.names}
            changed = self.call.callback_on_step_end(self.pipe, k, t, dict(given)) or {}
            latents = changed.get("latents", latents)
            self._take({n: v for n, v in changed.items() if n != "latents" and v is not given.get(n)})
            guided = self.pipe.do_classifier_free_guidance
            self.run.guidance_scale = self.pipe._guidance_scale if guided else 1.0
            self.run.stop = self.pipe._interrupt
        step, last = schedule.step_of_call[k], k + 1 == schedule.calls
        ends_step = last or schedule.step_of_call[k + 1] != step
        if self.call.callback is not None and ends_step and step % (self.call.callback_steps or 1) == 0:
            self.call.callback(step, t, latents)
        self.run.stop = self.run.stop or self.pipe._interrupt
        self.done(k)
        return latents

    def _tensor(self, name: str, k: int, before: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
        rows = len(latents)
        if name == "latents":
            return latents
        if name == "preview":
            p, q = self.run.schedule.clean[k].unbind(-1)
            return self.pipe.preview(p * before + q * prediction[:, : before.shape[1]])
        if name in _CONTROL_IMAGES:
            images = [control.image for control in self.run.controls if hasattr(control, "image")]
            return images[0] if len(images) == 1 else images  # type: ignore[return-value]
        if name in _NEGATIVE:
            return self.run.conditioning[_NEGATIVE[name]][:-rows]
        if name == "mask":
            return self.run.rule[1]["mask"] if self.run.rule is not None else self.run.channels[:, :1]  # type: ignore[index]
        if name == "masked_image_latents":
            return before.new_zeros(0) if self.run.channels is None else self.run.channels[:, 1:]
        return self.run.conditioning[name]

    def _take(self, changed: dict[str, Tensor]) -> None:
        """Puts replaced tensors in place; what was prepared from the old ones is made again."""
        run, rows = self.run, self.call.prompts * self.call.num_images_per_prompt
        for name, value in changed.items():
            if name in _CONTROL_IMAGES:
                shown = [control for control in run.controls if hasattr(control, "image")]
                for control, image in zip(shown, value if isinstance(value, list) else [value], strict=True):
                    control.show(image)  # type: ignore[attr-defined]
            elif name in _NEGATIVE:
                kept = run.conditioning[_NEGATIVE[name]][-rows:]
                run.conditioning = {**run.conditioning, _NEGATIVE[name]: torch.cat([value, kept])}
            elif name == "mask" and run.rule is not None:
                run.rule = (run.rule[0], {**run.rule[1], "mask": value[-rows:]})
            elif name in ("mask", "masked_image_latents") and run.channels is not None:
                mask, masked = run.channels[:, :1], run.channels[:, 1:]
                parts = (value[-rows:], masked) if name == "mask" else (mask, value[-rows:])
                run.channels = torch.cat(parts, 1)
            elif name in run.conditioning:
                run.conditioning = {**run.conditioning, name: value}
        if changed:
            run.forget()


# Tensors of a callback under the peer's names: unconditional halves, and the control images of its ControlNet classes.
_NEGATIVE = {
    "negative_prompt_embeds": "prompt_embeds",
    "negative_pooled_prompt_embeds": "add_text_embeds",
    "negative_add_time_ids": "add_time_ids",
    "add_neg_time_ids": "add_time_ids",
}
_CONTROL_IMAGES = ("image", "control_image")


def _texts(prompt: Any, rows: int | None = None) -> list[str]:
    """A list of texts; a single one stands for every row."""
    texts = [prompt] * (rows or 1) if isinstance(prompt, str) else list(prompt)
    if rows is not None and len(texts) != rows:
        raise ValueError(f"{len(texts)} negative prompts for {rows} prompts: give one, or one for each")
    return texts


def _plain(picture: Any) -> Any:
    """RGB pictures and float arrays: what diffusers' image processor expects."""
    if isinstance(picture, (list, tuple)):
        return [_plain(one) for one in picture]
    if isinstance(picture, Image.Image):
        return eight_bit(picture)
    bytes_of = {np.ndarray: np.uint8, Tensor: torch.uint8}.get(type(picture))
    return picture / np.float32(255) if bytes_of is not None and picture.dtype == bytes_of else picture


def _check_size(height: int, width: int, factor: int) -> None:
    if height % factor or width % factor or height < factor or width < factor:
        near = [max(factor, round(side / factor) * factor) for side in (width, height)]
        raise ValueError(
            f"width and height must be multiples of {factor}, not {width} x {height}; nearest {near[0]} x {near[1]}"
        )


def _watermark(wanted: bool | None) -> Any:
    """SDXL's invisible watermark: where it is asked for, or its library is installed and nothing was said."""
    from diffusers.utils import is_invisible_watermark_available

    if wanted is False or (wanted is None and not is_invisible_watermark_available()):
        return None
    if not is_invisible_watermark_available():
        warnings.warn("add_watermarker needs the package invisible-watermark; pictures are not marked", stacklevel=3)
        return None
    from diffusers.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker

    return StableDiffusionXLWatermarker()

