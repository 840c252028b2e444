"""IP-Adapters as the peer's users load and scale them: kept by the pipeline, controls in each call, the UNet as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from torch import Tensor

from diffusion_kit.adapters.ip_adapter import EncodedTokens, ImagePrompt, IPAdapter
from diffusion_kit.adapters.pictures import as_list
from diffusion_kit.sampling.loop import Run

from .base import ControlledPipeline
from .call import LateControls, TextCall


class IPAdapterMixin(ControlledPipeline):
    """For families with the components `image_encoder` and `feature_extractor`, whose call takes `ip_adapter_image`."""

    _ip_adapters: Sequence[IPAdapter] = ()
    _ip_scales: Sequence[Any] = ()
    _prompts_of_call: Callable[[], list[ImagePrompt]] = staticmethod(list)

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        **hub: Any,
    ) -> None:
        """Loads an adapter, or several where `weight_name` is a list, in place of those loaded before.

        They use the pipeline's image encoder; where it has none, the one beside the first adapter becomes its component.
        See `IPAdapter.from_pretrained`.
        """
        names = as_list(weight_name)
        sources = _one_or_each(pretrained_model_name_or_path_or_dict, len(names), "sources")
        folders = _one_or_each(subfolder, len(names), "subfolders")
        loaded: list[IPAdapter] = []
        for source, folder, name in zip(sources, folders, names, strict=True):
            adapter = IPAdapter.from_pretrained(
                source,
                subfolder=folder,
                weight_name=name,
                image_encoder=self.image_encoder or image_encoder_folder,
                feature_extractor=self.feature_extractor,
                torch_dtype=self.unet.dtype,
                **hub,
            )
            self.register_modules(image_encoder=adapter.image_encoder, feature_extractor=adapter.feature_extractor)
            loaded.append(adapter)
        self._ip_adapters, self._ip_scales = loaded, [1.0] * len(loaded)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """A number or {"down": {"block_2": [0.0, 1.0]}, "up": ..., "mid": ...} for all adapters, what is not named is 0; or
        a list, one for each adapter, in which a list has one number for each of the adapter's masked pictures."""
        scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(self._ip_adapters)
        if not scales or len(scales) != len(self._ip_adapters):
            raise ValueError(f"{len(scales)} scales for {len(self._ip_adapters)} loaded IP-Adapters")
        self._ip_scales = _maybe_expand_lora_scales(self.unet, scales, default_scale=0.0)

    def unload_ip_adapter(self) -> None:
        """Forgets the adapters and the image encoder; the feature extractor too, unless a safety checker needs it."""
        self._ip_adapters, self._ip_scales = (), ()
        self.register_modules(image_encoder=None)
        if not hasattr(self, "safety_checker"):
            self.register_modules(feature_extractor=None)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers'; loaded adapters come along."""
        made = super().from_pipe(pipeline, **kwargs)
        made._ip_adapters, made._ip_scales = getattr(pipeline, "_ip_adapters", ()), getattr(pipeline, "_ip_scales", ())
        return made

    @torch.no_grad()
    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Sequence[Tensor] | None,
        device: torch.device | None,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> list[Tensor]:
        """For each adapter (N, pictures, ...), with guidance (2 N, ...), ready for `ip_adapter_image_embeds`."""
        result = []
        images = self._for_each_adapter(ip_adapter_image, ip_adapter_image_embeds)
        for adapter, image in zip(self._ip_adapters, images, strict=True):
            given = isinstance(image, Tensor)
            halves = image.chunk(2) if given else [half[None] for half in adapter.embed(image[0])]
            if not do_classifier_free_guidance:
                halves = [image] if given else halves[1:]
            result.append(torch.cat([half.repeat_interleave(num_images_per_prompt, 0) for half in halves]).to(device))
        return result

    def generate(self, call: TextCall) -> Any:
        """The call with its image prompts as controls."""
        if call.ip_adapter_image is None and call.ip_adapter_image_embeds is None:
            return super().generate(call)
        call.check(self._callback_tensor_inputs)
        kwargs = dict(call.cross_attention_kwargs or {})
        self._prompts_of_call = partial(self._image_prompts, call, kwargs.pop("ip_adapter_masks", None))
        own, more = self._prompts_of_call(), call.controls
        controls = more.beside(own) if isinstance(more, LateControls) else [*more, *own]
        try:
            return super().generate(dataclasses.replace(call, controls=controls, cross_attention_kwargs=kwargs or None))
        finally:
            self._prompts_of_call = list  # the next call may have none

    def rescale(self, run: Run) -> None:
        """Gives the run's image prompts the scales that a callback has set.

        Raises:
            ValueError: one of them was 0 at the beginning, so that its picture was not read.
        """
        shown = {own.number: own for own in run.controls if isinstance(own, EncodedTokens) and own.number is not None}
        for prompt in self._prompts_of_call():
            if prompt.number in shown:
                shown[prompt.number].layers = shown[prompt.number].at(prompt.scale)
            elif any(prompt.scales):
                raise ValueError("the scale of an IP-Adapter was 0 when the call began: begin with a small one")
        run.forget()

    def _image_prompts(self, call: TextCall, masks: Any) -> list[ImagePrompt]:
        """A control for each adapter; with masks one for each picture of it."""
        images = self._for_each_adapter(call.ip_adapter_image, call.ip_adapter_image_embeds)
        masks = list(masks[:, None]) if isinstance(masks, Tensor) else masks or [None] * len(images)
        if len(masks) != len(images):
            raise ValueError(f"{len(masks)} ip_adapter_masks for {len(images)} IP-Adapters: give one for each")
        each = [
            (adapter, *apart)
            for adapter, image, scale, mask in zip(self._ip_adapters, images, self._ip_scales, masks, strict=True)
            for apart in _apart(image, scale, mask)
        ]
        return [
            ImagePrompt(adapter, shown, scale=share, mask=area, number=number)
            for number, (adapter, shown, share, area) in enumerate(each)
        ]

    def _for_each_adapter(self, pictures: Any, embeds: Any) -> list[Any]:
        """What each adapter is shown, as a `Control` takes it: embeddings, or [[pictures that act together]]."""
        given = as_list(pictures if embeds is None else embeds)
        if not self._ip_adapters:
            raise ValueError("ip_adapter_image needs an IP-Adapter: call load_ip_adapter first")
        if len(given) != len(self._ip_adapters):
            own = f"{len(given)} images for {len(self._ip_adapters)} loaded IP-Adapters"
            raise ValueError(f"{own}: give one for each; several for one are a list in the list")
        if embeds is not None:
            return given
        return [[list(own) if isinstance(own, Tensor) else as_list(own)] for own in given]


def _one_or_each(values: Any, n: int, what: str) -> list[Any]:
    own = as_list(values)
    if len(own) not in (1, n):
        raise ValueError(f"{len(own)} {what} for {n} IP-Adapters: give one, or one for each")
    return own * n if len(own) == 1 else own


def _apart(image: Any, scale: Any, mask: Tensor | None) -> list[tuple[Any, Any, Tensor | None]]:
    """(image, scale, mask) of each picture, which has a mask of its own in (1, pictures, H, W); else of all together."""
    if mask is None and isinstance(scale, list):
        raise ValueError("a scale for each picture of an IP-Adapter needs ip_adapter_masks")
    if mask is None:
        return [(image, scale, None)]
    pictures = image.split(1, 1) if isinstance(image, Tensor) else [[[picture]] for picture in image[0]]
    scales = scale if isinstance(scale, list) else [scale] * len(pictures)
    if not mask.shape[1] == len(scales) == len(pictures):
        raise ValueError(f"{mask.shape[1]} masks, {len(scales)} scales for {len(pictures)} pictures of an IP-Adapter")
    return list(zip(pictures, scales, mask.split(1, 1), strict=True))
