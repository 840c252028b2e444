"""The peer's classes of Kandinsky 2.x under their own names: see `peers` for what a declaration says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from diffusion_kit.adapters.control import Control

from .call import listed
from .kandinsky import Kandinsky21Pipeline, Kandinsky22Pipeline
from .kandinsky_combined import Kandinsky21CombinedPipeline, Kandinsky22CombinedPipeline
from .peers import ImageArguments, InpaintArguments, made_of, need

_EMBEDS = "image_embeds negative_image_embeds"
_SIZE = "height width num_inference_steps"
_MANY = "num_images_per_prompt generator"
_OLD = "output_type callback callback_steps return_dict"
_NEW = "output_type return_dict callback_on_step_end callback_on_step_end_tensor_inputs"
_PRIOR = "prior_guidance_scale prior_num_inference_steps generator latents"
_PRIOR_CALLBACK = (
    "prior_callback_on_step_end prior_callback_on_step_end_tensor_inputs "
    "callback_on_step_end callback_on_step_end_tensor_inputs"
)
SQUARE: Mapping[str, Any] = {"height": 512, "width": 512}


class WithoutPrompt(Kandinsky22Pipeline):
    """The decoders of 2.2. Guides for both versions give them a prompt, which they do not read."""

    def accept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = args[0] if args else None
        texts = first if isinstance(first, (list, tuple)) else [first]
        positional = all(isinstance(text, str) for text in texts)
        if not positional and "prompt" not in kwargs:
            return args, kwargs
        warnings.warn(f"{type(self).__name__} reads no prompt: image_embeds say what the picture shows", stacklevel=4)
        return args[positional:], {name: value for name, value in kwargs.items() if name != "prompt"}


class HintArguments(WithoutPrompt):
    """The decoders whose UNet takes a hint."""

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        values = need(super().translate(values), type(self).__name__, "hint")
        hint, more = Control("hint", values.pop("hint")), listed(values.pop("controls", ()))
        return {**values, "controls": [hint, *more]}


# Kandinsky 2.1


class KandinskyPipeline(Kandinsky21Pipeline):
    arguments = f"prompt {_EMBEDS} negative_prompt {_SIZE} guidance_scale {_MANY} latents {_OLD}"
    defaults: ClassVar = SQUARE


class KandinskyImg2ImgPipeline(ImageArguments, Kandinsky21Pipeline):
    peer_name = "KandinskyImg2ImgPipeline"
    arguments = f"prompt image {_EMBEDS} negative_prompt {_SIZE} strength guidance_scale {_MANY} {_OLD}"
    defaults: ClassVar = {**SQUARE, "strength": 0.3, "guidance_scale": 7.0}
    __init__ = made_of(Kandinsky21Pipeline, "text_encoder movq tokenizer unet scheduler")


class KandinskyInpaintPipeline(InpaintArguments, Kandinsky21Pipeline):
    peer_name = "KandinskyInpaintPipeline"
    arguments = f"prompt image mask_image {_EMBEDS} negative_prompt {_SIZE} guidance_scale {_MANY} latents {_OLD}"
    defaults: ClassVar = SQUARE
    __init__ = made_of(Kandinsky21Pipeline, "text_encoder movq tokenizer unet scheduler")


class KandinskyCombinedPipeline(Kandinsky21CombinedPipeline):
    arguments = (
        f"prompt negative_prompt num_inference_steps guidance_scale num_images_per_prompt height width {_PRIOR} {_OLD}"
    )
    defaults: ClassVar = SQUARE


class KandinskyImg2ImgCombinedPipeline(ImageArguments, Kandinsky21CombinedPipeline):
    peer_name = "KandinskyImg2ImgCombinedPipeline"
    arguments = (
        "prompt image negative_prompt num_inference_steps guidance_scale num_images_per_prompt strength height width "
        f"{_PRIOR} {_OLD}"
    )
    defaults: ClassVar = {**SQUARE, "strength": 0.3}


class KandinskyInpaintCombinedPipeline(InpaintArguments, Kandinsky21CombinedPipeline):
    peer_name = "KandinskyInpaintCombinedPipeline"
    arguments = (
        "prompt image mask_image negative_prompt num_inference_steps guidance_scale num_images_per_prompt height width "
        f"{_PRIOR} {_OLD}"
    )
    defaults: ClassVar = SQUARE


# Kandinsky 2.2


class KandinskyV22Pipeline(WithoutPrompt):
    arguments = f"{_EMBEDS} {_SIZE} guidance_scale {_MANY} latents {_NEW}"
    defaults: ClassVar = SQUARE


class KandinskyV22Img2ImgPipeline(ImageArguments, WithoutPrompt):
    peer_name = "KandinskyV22Img2ImgPipeline"
    arguments = f"image_embeds image negative_image_embeds {_SIZE} guidance_scale strength {_MANY} {_NEW}"
    defaults: ClassVar = {**SQUARE, "strength": 0.3}


class KandinskyV22InpaintPipeline(InpaintArguments, WithoutPrompt):
    peer_name = "KandinskyV22InpaintPipeline"
    arguments = f"image_embeds image mask_image negative_image_embeds {_SIZE} guidance_scale {_MANY} latents {_NEW}"
    defaults: ClassVar = SQUARE


class KandinskyV22ControlnetPipeline(HintArguments):
    peer_name = "KandinskyV22ControlnetPipeline"
    arguments = f"{_EMBEDS} hint {_SIZE} guidance_scale {_MANY} latents {_OLD}"
    defaults: ClassVar = SQUARE


class KandinskyV22ControlnetImg2ImgPipeline(HintArguments, ImageArguments):
    peer_name = "KandinskyV22ControlnetImg2ImgPipeline"
    arguments = f"image_embeds image negative_image_embeds hint {_SIZE} guidance_scale strength {_MANY} {_OLD}"
    defaults: ClassVar = {**SQUARE, "strength": 0.3}


class KandinskyV22CombinedPipeline(Kandinsky22CombinedPipeline):
    arguments = (
        "prompt negative_prompt num_inference_steps guidance_scale num_images_per_prompt height width "
        f"{_PRIOR} {_OLD} {_PRIOR_CALLBACK}"
    )
    defaults: ClassVar = SQUARE


class KandinskyV22Img2ImgCombinedPipeline(ImageArguments, Kandinsky22CombinedPipeline):
    peer_name = "KandinskyV22Img2ImgCombinedPipeline"
    arguments = (
        "prompt image negative_prompt num_inference_steps guidance_scale strength num_images_per_prompt height width "
        f"{_PRIOR} {_OLD} {_PRIOR_CALLBACK}"
    )
    defaults: ClassVar = {**SQUARE, "strength": 0.3}


class KandinskyV22InpaintCombinedPipeline(InpaintArguments, Kandinsky22CombinedPipeline):
    peer_name = "KandinskyV22InpaintCombinedPipeline"
    arguments = (
        "prompt image mask_image negative_prompt num_inference_steps guidance_scale num_images_per_prompt height width "
        f"{_PRIOR} output_type return_dict {_PRIOR_CALLBACK}"
    )
    defaults: ClassVar = SQUARE
