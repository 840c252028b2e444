"""The peer's Stable Diffusion classes under their own names: see `peers` for what a declaration says."""

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
from .sd15 import SD15Pipeline

_COMPONENTS = "vae text_encoder tokenizer unet"
_OTHERS = "scheduler safety_checker feature_extractor"
_STEPS = "num_inference_steps timesteps sigmas"
_NEGATIVES = "negative_prompt num_images_per_prompt eta generator"
_EMBEDS = "prompt_embeds negative_prompt_embeds"
_IP = "ip_adapter_image ip_adapter_image_embeds"
_OUTPUT = "output_type return_dict"
_CALLBACK = "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs"


class StableDiffusionPipeline(SD15Pipeline):
    arguments = (
        f"prompt height width {_STEPS} guidance_scale {_NEGATIVES} latents {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs guidance_rescale {_CALLBACK}"
    )


class StableDiffusionImg2ImgPipeline(ImageArguments, SD15Pipeline):
    peer_name = "StableDiffusionImg2ImgPipeline"
    arguments = (
        f"prompt image strength {_STEPS} guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 0.8}


class StableDiffusionInpaintPipeline(InpaintArguments, SD15Pipeline):
    peer_name = "StableDiffusionInpaintPipeline"
    arguments = (
        f"prompt image mask_image masked_image_latents height width padding_mask_crop strength {_STEPS} guidance_scale "
        f"{_NEGATIVES} latents {_EMBEDS} {_IP} {_OUTPUT} cross_attention_kwargs {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 1.0}
    scheduler_settings: ClassVar = {"steps_offset": 1, "skip_prk_steps": True}


class StableDiffusionAdapterPipeline(AdapterArguments, SD15Pipeline):
    peer_name = "StableDiffusionAdapterPipeline"
    arguments = (
        f"prompt image height width {_STEPS} guidance_scale {_NEGATIVES} latents {_EMBEDS} {_OUTPUT} "
        "callback callback_steps cross_attention_kwargs adapter_conditioning_scale clip_skip"
    )
    defaults: ClassVar = {"adapter_conditioning_scale": 1.0}
    scheduler_settings: ClassVar = {}
    __init__ = made_of(
        SD15Pipeline, f"{_COMPONENTS} adapter {_OTHERS} requires_safety_checker image_encoder", MultiAdapter
    )


class StableDiffusionControlNetPipeline(ControlNetArguments, SD15Pipeline):
    peer_name = "StableDiffusionControlNetPipeline"
    image_argument = "image"
    arguments = (
        f"prompt image height width {_STEPS} guidance_scale {_NEGATIVES} latents {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs {CONTROLNET} {_CALLBACK}"
    )
    defaults: ClassVar = CONTROLNET_DEFAULTS
    scheduler_settings: ClassVar = {}
    __init__ = made_of(
        SD15Pipeline,
        f"{_COMPONENTS} controlnet {_OTHERS} image_encoder requires_safety_checker",
        MultiControlNetModel,
    )


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionControlNetPipeline):
    peer_name = "StableDiffusionControlNetImg2ImgPipeline"
    needs: ClassVar[tuple[str, ...]] = ("image",)
    image_argument = "control_image"
    arguments = (
        f"prompt image control_image height width strength num_inference_steps guidance_scale {_NEGATIVES} latents "
        f"{_EMBEDS} {_IP} {_OUTPUT} cross_attention_kwargs {CONTROLNET} {_CALLBACK}"
    )
    defaults: ClassVar = {**CONTROLNET_DEFAULTS, "strength": 0.8, "controlnet_conditioning_scale": 0.8}


class StableDiffusionControlNetInpaintPipeline(StableDiffusionControlNetImg2ImgPipeline):
    peer_name = "StableDiffusionControlNetInpaintPipeline"
    needs = ("image", "mask_image")
    arguments = (
        "prompt image mask_image control_image height width padding_mask_crop strength num_inference_steps guidance_scale "
        f"{_NEGATIVES} latents {_EMBEDS} {_IP} {_OUTPUT} cross_attention_kwargs {CONTROLNET} {_CALLBACK}"
    )
    defaults: ClassVar = {**CONTROLNET_DEFAULTS, "strength": 1.0, "controlnet_conditioning_scale": 0.5}
