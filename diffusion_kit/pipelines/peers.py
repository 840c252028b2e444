"""What the peer's classes are made of, whatever the family: the same components and call arguments over the one call.

A declaration says which arguments it takes, in the peer's order, which defaults differ from the family's, and derives from
the class here that turns the peer's arguments into the family's. Arguments of adapters become `Control` values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_type_hints

import numpy as np
from diffusers import MultiAdapter, MultiControlNetModel
from PIL import Image
from torch import Tensor

from diffusion_kit.adapters.control import Control, Mode
from diffusion_kit.adapters.pictures import as_list
from diffusion_kit.sampling.schedule import Schedule

from .call import LateControls, listed
from .latent import LatentPipeline

CONTROLNET = "controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end"
CONTROLNET_DEFAULTS = {
    "controlnet_conditioning_scale": 1.0,
    "guess_mode": False,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}


def made_of(family: type[LatentPipeline], names: str, several: type | None = None) -> Callable[..., None]:
    """A constructor over that of `family`, with the components and flags `names` in the peer's order.

    A name that the family does not know is the adapter; a list of adapters is wrapped in `several`.
    """
    takes = inspect.signature(family.__init__).parameters
    adapters = [name for name in names.split() if name not in takes]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [takes.get(name, inspect.Parameter(name, kind)) for name in ("self", *names.split())]
    signature = inspect.Signature(parameters)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        if "add_watermarker" in takes:
            values.setdefault("add_watermarker", False)
        given = {name: values.pop(name) for name in adapters}
        family.__init__(**values)
        for name, adapter in given.items():
            many = several is not None and isinstance(adapter, (list, tuple))
            self.register_modules(**{name: several(list(adapter)) if many else adapter})

    init.__signature__ = signature  # type: ignore[attr-defined]
    # diffusers reads the components' types from here; strings would be looked up among this module's names.
    init.__annotations__ = {
        name: hint for name, hint in get_type_hints(family.__init__).items() if name in signature.parameters
    }
    return init


class ImageArguments(LatentPipeline):
    """The peer's image-to-image classes."""

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        return need(values, type(self).__name__, "image")


class InpaintArguments(LatentPipeline):
    """The peer's inpainting classes: of the size that the model was made for, whatever the picture's."""

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        height, width = self.native_size
        values["height"], values["width"] = values["height"] or height, values["width"] or width
        return need(values, type(self).__name__, "image", "mask_image")


class AdapterArguments(LatentPipeline):
    """The peer's T2I-Adapter classes."""

    def own_adapters(self) -> Sequence[Any]:
        return (self.adapter,)

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        """The factor of the peer is `end`: the adapter acts in the first int(n x factor) of n steps."""
        need(values, type(self).__name__, "image")
        image, scale = values.pop("image"), values.pop("adapter_conditioning_scale")
        factor = values.pop("adapter_conditioning_factor", 1.0)
        multi = isinstance(self.adapter, MultiAdapter)
        first = as_list(image[0] if multi else image)[0]
        _default_size(self, values, first, self.adapter.downscale_factor)

        def controls(schedule: Schedule) -> list[Control]:
            n = schedule.steps
            return [Control(self.adapter, image, scale=scale, end=min(max(int(n * factor), 0), n) / n)]

        return {**values, "controls": LateControls(controls, listed(values.pop("controls", ())))}


class ControlNetArguments(LatentPipeline):
    """The peer's ControlNet classes: the networks of the pipeline, with their images, scales and windows."""

    image_argument: ClassVar[str] = "control_image"
    needs: ClassVar[tuple[str, ...]] = ()  # beside it

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        need(values, type(self).__name__, *self.needs, self.image_argument)
        names = (self.image_argument, *CONTROLNET.split())
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

        return {**values, "controls": LateControls(controls, listed(values.pop("controls", ())))}


def need(values: dict[str, Any], who: str, *names: str) -> dict[str, Any]:
    for name in names:
        if values.get(name) is None:
            raise ValueError(f"{who} needs {name}=")
    return values


def _default_size(pipe: LatentPipeline, values: dict[str, Any], picture: Any, multiple: int) -> None:
    """Height and width that were not given are the picture's, rounded down to a multiple. What is no picture is told of
    where it is read."""
    if not isinstance(picture, (Image.Image, np.ndarray, Tensor)):
        return
    if isinstance(picture, Image.Image):
        width, height = picture.size
    else:
        height, width = picture.shape[-2:] if isinstance(picture, Tensor) or picture.ndim == 2 else picture.shape[-3:-1]
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
