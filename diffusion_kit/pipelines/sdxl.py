"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): base and refiner, three tasks, any controls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusion_kit.adapters.control import Site
from diffusion_kit.models.denoiser import make_denoiser
from diffusion_kit.models.text import Text, count_windows, encode_text, encode_weighted
from diffusion_kit.models.vae import encode_picture, scale_factor
from diffusion_kit.sampling.guidance import guidance_embedding
from diffusion_kit.sampling.loop import Run
from diffusion_kit.sampling.schedule import Schedule, make_schedule

from .base import ControlledPipeline, loras_scaled
from .callbacks import Callbacks
from .canvas import Canvas, make_canvas
from .sdxl_call import SDXLCall
from .starts import Batch, Start, from_masked_picture, from_noise, from_picture


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
        call.check(self._callback_tensor_inputs)
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
        latents = self.denoise(run, start.latents, Callbacks(self, call, run)).to(self.unet.dtype)
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
        return make_canvas(
            self.image_processor,
            call.image,
            call.mask_image,
            call.height,
            call.width,
            call.padding_mask_crop,
            native=self.default_sample_size * self.vae_scale_factor,
            latent_channels=self.vae.config.latent_channels,
        )

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
            lora_scale=(call.cross_attention_kwargs or {}).get("scale"),
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
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        weighted = prompt_syntax == "weighted" and prompt is not None
        windows = self._windows(prompt, prompt_2, negative_prompt, negative_prompt_2) if weighted else None
        with loras_scaled(lora_scale, *encoders):
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

    def _encode(
        self, texts: Sequence[Sequence[str]], skip: int, windows: int | None, length: int | None = None
    ) -> Text:
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


def _texts(prompt: Any, rows: int | None = None) -> list[str]:
    """A list of texts; a single one stands for every row."""
    texts = [prompt] * (rows or 1) if isinstance(prompt, str) else list(prompt)
    if rows is not None and len(texts) != rows:
        raise ValueError(f"{len(texts)} negative prompts for {rows} prompts: give one, or one for each")
    return texts


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
