"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752): three tasks, any controls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from diffusion_kit.models.attention import locked
from diffusion_kit.models.text import Layer, count_windows, encode_prompts

from .base import loras_scaled
from .call import TextCall
from .canvas import Canvas
from .ip_adapters import IPAdapterMixin
from .latent import LatentPipeline, texts


@dataclass
class SD15Call(TextCall):
    __doc__ = f"{TextCall.__doc__}"

    strengths: ClassVar[tuple[float, float]] = (0.8, 1.0)


TEXT_ARGUMENTS = (
    "prompt negative_prompt prompt_embeds negative_prompt_embeds num_images_per_prompt clip_skip prompt_syntax"
).split()


class SD15Pipeline(
    IPAdapterMixin,
    LatentPipeline,
    StableDiffusionMixin,
    FromSingleFileMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
):
    """The family of Stable Diffusion 1.x and 2.x: see `SD15Call` for its one call, and the peer for loading, LoRA,
    offloading and saving. Pictures that the safety checker flags, where there is one, are black."""

    Call = SD15Call
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = (
        "latents prompt_embeds negative_prompt_embeds image control_image mask masked_image_latents preview"
    ).split()
    # What old scheduler configurations say and the peer's class of this task sets right.
    scheduler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        if unet is not None and unet.config.get("addition_embed_type") == "text_time":
            raise ValueError(f"this UNet is SDXL's, which {type(self).__name__} is not made for: use SDXLPipeline")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor: give both, or safety_checker=None")
        self._correct(scheduler)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self._set_up()
        self._flagged: list[bool] | None = None

    def _correct(self, scheduler: Any) -> None:
        for name, value in self.scheduler_settings.items():
            found = getattr(scheduler, "config", {}).get(name, value)
            if found != value:
                warnings.warn(
                    f"{type(scheduler).__name__} has {name}={found}; Stable Diffusion needs {name}={value}, which is "
                    "used: correct its configuration",
                    stacklevel=4,
                )
                scheduler.register_to_config(**{name: value})

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels for which the model was made."""
        height, width = super().native_size
        released = tuple(int(part) for part in str(self.unet.config.get("_diffusers_version", "1")).split(".")[:2])
        least = 64 * self.vae_scale_factor if released < (0, 9) else 0  # first configurations say 32 and mean 64
        return max(height, least), max(width, least)

    @property
    def peer_name(self) -> str:  # type: ignore[override]
        return "StableDiffusionInstructPix2PixPipeline" if self.own_control == "instruct" else "StableDiffusionPipeline"

    upcasts = False  # the configurations of its autoencoders leave it at True, and float16 is enough for them

    def decode(self, latents: Tensor, output_type: str, **beside: Tensor) -> Any:
        self._flagged = None
        return super().decode(latents, output_type, **beside)

    def finish(self, pixels: Tensor) -> Tensor:
        """Pictures that the safety checker flags are black."""
        if self.safety_checker is None:
            return pixels
        shown = self.feature_extractor(self.image_processor.postprocess(pixels), return_tensors="pt").pixel_values
        seen = shown.to(self.safety_checker.device, self.safety_checker.dtype)
        _, self._flagged = self.safety_checker(images=pixels.clone(), clip_input=seen)
        flagged = torch.tensor(self._flagged, device=pixels.device)
        return torch.where(flagged[:, None, None, None], -torch.ones_like(pixels), pixels)

    def output(self, images: Any, return_dict: bool) -> Any:
        flagged, self._flagged = self._flagged, None
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def conditioning(self, call: SD15Call, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        prompt, negative = self.encode_prompt(
            device=device,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            lora_scale=(call.cross_attention_kwargs or {}).get("scale"),
            **{name: getattr(call, name) for name in TEXT_ARGUMENTS},
        )
        states = prompt if negative is None else torch.cat([negative, prompt])
        return {"prompt_embeds": states, **self.guidance_condition(len(prompt), device)}

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_syntax: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states (B, tokens, width): prompt, negative (None without guidance).

        B is prompts x num_images_per_prompt. `clip_skip` leaves out that many layers for the prompt.
        """
        device = device or self._execution_device
        windows = None
        if prompt_syntax == "weighted" and prompt is not None:
            own = [
                self.maybe_convert_prompt(t, self.tokenizer) for t in (*texts(prompt), *texts(negative_prompt or ""))
            ]
            windows = count_windows(own, self.tokenizer)
        if prompt_embeds is not None and self.tokenizer and prompt_embeds.shape[1] > self.tokenizer.model_max_length:
            windows = prompt_embeds.shape[1] // self.tokenizer.model_max_length

        def encode(prompts: list[str], skip: int, length: int | None = None) -> Tensor:
            own = [self.maybe_convert_prompt(text, self.tokenizer) for text in prompts]
            layer = Layer(skip, normed=True)
            more: dict[str, Any] = {"windows": windows, "length": length, "engine": self.encoding(self.engine)}
            return encode_prompts(own, self.tokenizer, self.text_encoder, layer, **more).states

        def spread_out(values: Tensor) -> Tensor:
            dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
            return values.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)

        encoders = [] if self.text_encoder is None else [self.text_encoder]
        with locked(*encoders), loras_scaled(lora_scale, *encoders):
            if prompt_embeds is None:
                prompt_embeds = encode(texts(prompt), clip_skip or 0)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negatives = texts(negative_prompt or "", len(prompt_embeds))
                negative_prompt_embeds = encode(negatives, 0, prompt_embeds.shape[1])
        states = spread_out(prompt_embeds)
        return states, spread_out(negative_prompt_embeds) if do_classifier_free_guidance else None  # type: ignore[arg-type]
