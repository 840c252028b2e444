"""The peer's SDXL classes under their own names: see `peers` for what a declaration says."""

from __future__ import annotations

from typing import ClassVar

from diffusers import MultiAdapter, MultiControlNetModel

from .peers import (
    CONTROLNET,
    CONTROLNET_DEFAULTS,
    AdapterArguments,
    ControlNetArguments,
    ImageArguments,
    InpaintArguments,
    made_of,
)
from .sdxl import SDXLPipeline

_COMPONENTS = "vae text_encoder text_encoder_2 tokenizer tokenizer_2 unet"
_OTHERS = "feature_extractor image_encoder"
_EMBEDS = "prompt_embeds negative_prompt_embeds pooled_prompt_embeds negative_pooled_prompt_embeds"
_IP = "ip_adapter_image ip_adapter_image_embeds"
_SIZES = "original_size crops_coords_top_left target_size"
_NEGATIVE_SIZES = "negative_original_size negative_crops_coords_top_left negative_target_size"
_SCORES = "aesthetic_score negative_aesthetic_score"
_NEGATIVES = "negative_prompt negative_prompt_2 num_images_per_prompt eta generator latents"
_STEPS = "num_inference_steps timesteps sigmas"
_OUTPUT = "output_type return_dict"
_CALLBACK = "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs"


class StableDiffusionXLPipeline(SDXLPipeline):
    arguments = (
        f"prompt prompt_2 height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_CALLBACK}"
    )


class StableDiffusionXLImg2ImgPipeline(ImageArguments, SDXLPipeline):
    peer_name = "StableDiffusionXLImg2ImgPipeline"
    arguments = (
        f"prompt prompt_2 image strength {_STEPS} denoising_start denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} "
        f"{_IP} {_OUTPUT} cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 0.3}


class StableDiffusionXLInpaintPipeline(InpaintArguments, SDXLPipeline):
    peer_name = "StableDiffusionXLInpaintPipeline"
    arguments = (
        "prompt prompt_2 image mask_image masked_image_latents height width padding_mask_crop strength "
        f"{_STEPS} denoising_start denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 0.9999, "guidance_scale": 7.5}


class StableDiffusionXLAdapterPipeline(AdapterArguments, SDXLPipeline):
    peer_name = "StableDiffusionXLAdapterPipeline"
    arguments = (
        f"prompt prompt_2 image height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"callback callback_steps cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} "
        "adapter_conditioning_scale adapter_conditioning_factor clip_skip"
    )
    defaults: ClassVar = {"adapter_conditioning_scale": 1.0, "adapter_conditioning_factor": 1.0}
    __init__ = made_of(
        SDXLPipeline, f"{_COMPONENTS} adapter scheduler force_zeros_for_empty_prompt {_OTHERS}", MultiAdapter
    )


class StableDiffusionXLControlNetPipeline(ControlNetArguments, SDXLPipeline):
    peer_name = "StableDiffusionXLControlNetPipeline"
    image_argument = "image"
    arguments = (
        f"prompt prompt_2 image height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs {CONTROLNET} {_SIZES} {_NEGATIVE_SIZES} {_CALLBACK}"
    )
    defaults: ClassVar = CONTROLNET_DEFAULTS
    __init__ = made_of(
        SDXLPipeline,
        f"{_COMPONENTS} controlnet scheduler force_zeros_for_empty_prompt add_watermarker {_OTHERS}",
        MultiControlNetModel,
    )


class StableDiffusionXLControlNetImg2ImgPipeline(ControlNetArguments, SDXLPipeline):
    peer_name = "StableDiffusionXLControlNetImg2ImgPipeline"
    needs: ClassVar[tuple[str, ...]] = ("image",)
    arguments = (
        f"prompt prompt_2 image control_image height width strength num_inference_steps guidance_scale {_NEGATIVES} "
        f"{_EMBEDS} {_IP} {_OUTPUT} cross_attention_kwargs {CONTROLNET} {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {
        **CONTROLNET_DEFAULTS,
        "strength": 0.8,
        "controlnet_conditioning_scale": 0.8,
    }
    __init__ = made_of(
        SDXLPipeline,
        f"{_COMPONENTS} controlnet scheduler requires_aesthetics_score force_zeros_for_empty_prompt add_watermarker "
        f"{_OTHERS}",
        MultiControlNetModel,
    )


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLControlNetImg2ImgPipeline):
    peer_name = "StableDiffusionXLControlNetInpaintPipeline"
    needs = ("image", "mask_image")
    arguments = (
        "prompt prompt_2 image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"denoising_start denoising_end guidance_scale {_NEGATIVES} prompt_embeds negative_prompt_embeds {_IP} "
        f"pooled_prompt_embeds negative_pooled_prompt_embeds {_OUTPUT} cross_attention_kwargs {CONTROLNET} "
        f"guidance_rescale {_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {**CONTROLNET_DEFAULTS, "strength": 0.9999}
