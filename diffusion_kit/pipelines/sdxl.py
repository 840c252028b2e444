"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): base and refiner, three tasks, any controls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
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

from diffusion_kit.models.attention import locked
from diffusion_kit.models.text import Layer, Text, count_windows, encode_prompts

from .base import loras_scaled
from .canvas import Canvas
from .ip_adapters import IPAdapterMixin
from .latent import LatentPipeline, texts
from .sdxl_call import SDXLCall

TEXT_ARGUMENTS = (
    "prompt prompt_2 negative_prompt negative_prompt_2 prompt_embeds negative_prompt_embeds pooled_prompt_embeds "
    "negative_pooled_prompt_embeds num_images_per_prompt clip_skip prompt_syntax"
).split()


class SDXLPipeline(
    IPAdapterMixin,
    LatentPipeline,
    StableDiffusionMixin,
    FromSingleFileMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
):
    """The SDXL family: see `SDXLCall` for its one call, and the peer for loading, LoRA, offloading and saving."""

    Call = SDXLCall
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = (
        "tokenizer tokenizer_2 text_encoder text_encoder_2 image_encoder feature_extractor"
    ).split()
    _callback_tensor_inputs: ClassVar[list[str]] = (
        "latents prompt_embeds negative_prompt_embeds add_text_embeds negative_pooled_prompt_embeds "
        "add_time_ids negative_add_time_ids add_neg_time_ids image control_image mask masked_image_latents "
        "preview"
    ).split()

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
        self._set_up()
        self.default_sample_size = unet.config.sample_size if unet is not None else 128
        self.watermark = _watermark(add_watermarker)

    @property
    def peer_name(self) -> str:  # type: ignore[override]
        if self.own_control == "instruct":
            return "StableDiffusionXLInstructPix2PixPipeline"
        return "StableDiffusionXLImg2ImgPipeline" if self.scores_aesthetics else "StableDiffusionXLPipeline"

    @property
    def scores_aesthetics(self) -> bool:
        return bool(self.config.get("requires_aesthetics_score"))

    def finish(self, pixels: Tensor) -> Tensor:
        return pixels if self.watermark is None else self.watermark.apply_watermark(pixels)

    def output(self, images: Any, return_dict: bool) -> Any:
        return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)

    # Text and sizes as conditioning

    def conditioning(self, call: SDXLCall, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        """(unconditional, conditional) embeddings along the batch, or the conditional ones without guidance."""
        guided = self.do_classifier_free_guidance
        prompt, negative, pooled, negative_pooled = self.encode_prompt(
            device=device,
            do_classifier_free_guidance=guided,
            lora_scale=(call.cross_attention_kwargs or {}).get("scale"),
            **{name: getattr(call, name) for name in TEXT_ARGUMENTS},
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
        conditioning |= self.guidance_condition(len(prompt), device)
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
        every = (prompt, prompt_2, negative_prompt, negative_prompt_2)
        windows = None
        if weighted:  # of the texts with all tokens of what was learned for them
            converted = [
                self.maybe_convert_prompt(text, self.tokenizer_2) for own in every for text in texts(own or "")
            ]
            windows = count_windows(converted, self.tokenizer_2)
        if (
            prompt_embeds is not None
            and self.tokenizer_2
            and prompt_embeds.shape[1] > self.tokenizer_2.model_max_length
        ):
            windows = prompt_embeds.shape[1] // self.tokenizer_2.model_max_length
        with locked(*encoders), loras_scaled(lora_scale, *encoders):
            if prompt_embeds is None:
                first = texts(prompt)
                pair = [first, texts(prompt_2 or prompt, len(first), "prompt_2")]
                prompt_embeds, own_pooled = self._encode(pair, clip_skip or 0, windows)
                pooled_prompt_embeds = own_pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
                    negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                    negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)  # type: ignore[arg-type]
                else:
                    sides = (negative_prompt or "", negative_prompt_2 or negative_prompt or "")
                    rows = [texts(negative, len(prompt_embeds)) for negative in sides]
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
        self, prompts: Sequence[Sequence[str]], skip: int, windows: int | None, length: int | None = None
    ) -> Text:
        """Both encoders' states side by side and the second's pooled state; `prompts` has the first's and the second's."""
        layer = Layer(1 + skip, normed=False)  # the layer before the last (arXiv 2307.01952)
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        results = []
        for (tokenizer, encoder), own in zip(pairs, prompts, strict=True):
            if encoder is None:
                continue
            own = [self.maybe_convert_prompt(text, tokenizer) for text in own]
            more: dict[str, Any] = {"windows": windows, "length": length, "engine": self.encoding(self.engine)}
            results.append(encode_prompts(own, tokenizer, encoder, layer, **more))
        return Text(torch.cat([text.states for text in results], -1), results[-1].pooled)


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
