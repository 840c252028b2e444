"""The peer's SDXL classes under their own names: the same components and call arguments over the one family.

A class says which arguments it takes, in the peer's order, which defaults differ from the family's, and how its adapter
arguments become `Control` values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_type_hints

from diffusers import MultiAdapter, MultiControlNetModel
from PIL import Image

from diffusion_kit.adapters.control import Control, Mode
from diffusion_kit.adapters.pictures import as_list
from diffusion_kit.sampling.schedule import Schedule

from .sdxl import SDXLPipeline

Controls = Callable[[Schedule], Sequence[Control]]  # made when the number of steps is known

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
_CONTROLNET = "controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end"


def with_adapter(names: str, several: type) -> Callable[..., None]:
    """A constructor over the family's, with the components and flags `names` in the peer's order.

    The one name that the family does not know is the adapter; a list of adapters is wrapped in `several`.
    """
    family = inspect.signature(SDXLPipeline.__init__).parameters
    (own,) = set(names.split()) - set(family)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [family.get(name, inspect.Parameter(name, kind)) for name in ("self", *names.split())]
    signature = inspect.Signature(parameters)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {"add_watermarker": False, **bound.arguments}
        adapter = values.pop(own)
        SDXLPipeline.__init__(**values)
        self.register_modules(**{own: several(list(adapter)) if isinstance(adapter, (list, tuple)) else adapter})

    init.__signature__ = signature  # type: ignore[attr-defined]
    # diffusers reads the components' types from here; strings would be looked up among this module's names.
    init.__annotations__ = {
        name: hint for name, hint in get_type_hints(SDXLPipeline.__init__).items() if name in signature.parameters
    }
    return init


class StableDiffusionXLPipeline(SDXLPipeline):
    arguments = (
        f"prompt prompt_2 height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_CALLBACK}"
    )


class StableDiffusionXLImg2ImgPipeline(SDXLPipeline):
    peer_name = "StableDiffusionXLImg2ImgPipeline"
    arguments = (
        f"prompt prompt_2 image strength {_STEPS} denoising_start denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} "
        f"{_IP} {_OUTPUT} cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 0.3}

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        return _need(values, type(self).__name__, "image")


class StableDiffusionXLInpaintPipeline(SDXLPipeline):
    peer_name = "StableDiffusionXLInpaintPipeline"
    arguments = (
        "prompt prompt_2 image mask_image masked_image_latents height width padding_mask_crop strength "
        f"{_STEPS} denoising_start denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {"strength": 0.9999, "guidance_scale": 7.5}

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        native = self.default_sample_size * self.vae_scale_factor
        values["height"], values["width"] = values["height"] or native, values["width"] or native
        return _need(values, type(self).__name__, "image", "mask_image")


class StableDiffusionXLAdapterPipeline(SDXLPipeline):
    peer_name = "StableDiffusionXLAdapterPipeline"
    arguments = (
        f"prompt prompt_2 image height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"callback callback_steps cross_attention_kwargs guidance_rescale {_SIZES} {_NEGATIVE_SIZES} "
        "adapter_conditioning_scale adapter_conditioning_factor clip_skip"
    )
    defaults: ClassVar = {"adapter_conditioning_scale": 1.0, "adapter_conditioning_factor": 1.0}
    __init__ = with_adapter(f"{_COMPONENTS} adapter scheduler force_zeros_for_empty_prompt {_OTHERS}", MultiAdapter)

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        """The factor of the peer is `end`: the adapter acts in the first int(n x factor) of n steps."""
        _need(values, type(self).__name__, "image")
        image, scale, factor = (
            values.pop(name) for name in ("image", "adapter_conditioning_scale", "adapter_conditioning_factor")
        )
        multi = isinstance(self.adapter, MultiAdapter)
        first = as_list(image[0] if multi else image)[0]
        _default_size(self, values, first, self.adapter.downscale_factor)

        def controls(schedule: Schedule) -> list[Control]:
            n = schedule.steps
            return [Control(self.adapter, image, scale=scale, end=min(max(int(n * factor), 0), n) / n)]

        return _with_controls(values, controls)


class _ControlNetPipeline(SDXLPipeline):
    """What the peer's three ControlNet classes share."""

    image_argument: ClassVar[str] = "control_image"

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        _need(values, type(self).__name__, self.image_argument)
        names = (self.image_argument, *_CONTROLNET.split())
        image, scale, guess, start, end = (values.pop(name) for name in names)
        many = isinstance(self.controlnet, MultiControlNetModel)
        nets = list(self.controlnet.nets) if many else [self.controlnet]
        images = list(image) if many else [image]
        columns = [_for_each(value, nets, many) for value in (scale, start, end)]
        if len(images) != len(nets):
            raise ValueError(f"{len(images)} control images for {len(nets)} ControlNets: give one for each")
        mode: Mode = "prompt" if guess or nets[0].config.global_pool_conditions else "balanced"
        size_of = values["image"] if "padding_mask_crop" in values else as_list(images[0])[0]
        _default_size(self, values, as_list(size_of)[0], self.vae_scale_factor)

        def controls(schedule: Schedule) -> list[Control]:
            result = []
            for net, picture, own_scale, own_start, own_end in zip(nets, images, *columns, strict=True):
                window = _window(own_start, own_end, schedule)
                if window is not None:
                    result.append(Control(net, picture, scale=own_scale, start=window[0], end=window[1], mode=mode))
            return result

        return _with_controls(values, controls)


class StableDiffusionXLControlNetPipeline(_ControlNetPipeline):
    peer_name = "StableDiffusionXLControlNetPipeline"
    image_argument = "image"
    arguments = (
        f"prompt prompt_2 image height width {_STEPS} denoising_end guidance_scale {_NEGATIVES} {_EMBEDS} {_IP} {_OUTPUT} "
        f"cross_attention_kwargs {_CONTROLNET} {_SIZES} {_NEGATIVE_SIZES} {_CALLBACK}"
    )
    defaults: ClassVar = {
        "controlnet_conditioning_scale": 1.0,
        "guess_mode": False,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
    }
    __init__ = with_adapter(
        f"{_COMPONENTS} controlnet scheduler force_zeros_for_empty_prompt add_watermarker {_OTHERS}",
        MultiControlNetModel,
    )


class StableDiffusionXLControlNetImg2ImgPipeline(_ControlNetPipeline):
    peer_name = "StableDiffusionXLControlNetImg2ImgPipeline"
    arguments = (
        f"prompt prompt_2 image control_image height width strength num_inference_steps guidance_scale {_NEGATIVES} "
        f"{_EMBEDS} {_IP} {_OUTPUT} cross_attention_kwargs {_CONTROLNET} {_SIZES} {_NEGATIVE_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {
        **StableDiffusionXLControlNetPipeline.defaults,
        "strength": 0.8,
        "controlnet_conditioning_scale": 0.8,
    }
    __init__ = with_adapter(
        f"{_COMPONENTS} controlnet scheduler requires_aesthetics_score force_zeros_for_empty_prompt add_watermarker "
        f"{_OTHERS}",
        MultiControlNetModel,
    )


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLControlNetImg2ImgPipeline):
    peer_name = "StableDiffusionXLControlNetInpaintPipeline"
    arguments = (
        "prompt prompt_2 image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"denoising_start denoising_end guidance_scale {_NEGATIVES} prompt_embeds negative_prompt_embeds {_IP} "
        f"pooled_prompt_embeds negative_pooled_prompt_embeds {_OUTPUT} cross_attention_kwargs {_CONTROLNET} "
        f"guidance_rescale {_SIZES} {_SCORES} {_CALLBACK}"
    )
    defaults: ClassVar = {**StableDiffusionXLControlNetPipeline.defaults, "strength": 0.9999}


def _need(values: dict[str, Any], who: str, *names: str) -> dict[str, Any]:
    for name in names:
        if values.get(name) is None:
            raise ValueError(f"{who} needs {name}=")
    return values


def _with_controls(values: dict[str, Any], own: Controls) -> dict[str, Any]:
    """The class's own adapter beside the `controls` of the call."""
    more = list(values.pop("controls", ()))
    return {**values, "controls": lambda schedule: [*own(schedule), *more]}


def _default_size(pipe: SDXLPipeline, values: dict[str, Any], picture: Any, multiple: int) -> None:
    """Height and width that were not given are the picture's, rounded down to a multiple."""
    if isinstance(picture, Image.Image):
        width, height = picture.size
    else:
        height, width = picture.shape[-2:] if hasattr(picture, "device") else picture.shape[:2]
    values["height"] = values["height"] or height // multiple * multiple
    values["width"] = values["width"] or width // multiple * multiple


def _for_each(value: Any, nets: Sequence[Any], many: bool) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * len(nets)
    if len(values) != len(nets) and many:
        raise ValueError(f"{len(values)} values for {len(nets)} ControlNets: give one, or one for each")
    return values[: len(nets)]


def _window(start: float, end: float, schedule: Schedule) -> tuple[float, float] | None:
    """The peer counts the window over the steps before `denoising_end` cut them; None where no step is left."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"control guidance from {start} to {end}: it must be 0 <= start < end <= 1")
    full, n = schedule.full_steps, schedule.steps
    steps = [i for i in range(n) if start <= i / full and (i + 1) / full <= end]
    return (steps[0] / n, (steps[-1] + 1) / n) if steps else None
