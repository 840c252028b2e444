"""What happens between calls of the network: the caller's callbacks, and what they changed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from diffusion_kit.sampling.loop import Run

# Tensors under the peer's names: unconditional halves of the conditioning, control images of its ControlNet classes.
_NEGATIVE = {
    "negative_prompt_embeds": "prompt_embeds",
    "negative_pooled_prompt_embeds": "add_text_embeds",
    "negative_add_time_ids": "add_time_ids",
    "add_neg_time_ids": "add_time_ids",
    "negative_image_embeds": "image_embeds",
    "negative_attention_mask": "attention_mask",
}
_CONTROL_IMAGES = ("image", "control_image")
# Where inpainting's extra channels are: of Stable Diffusion, of Kandinsky 2.x (whose mask is white where it keeps).
_CHANNELS = {
    "mask": slice(None, 1),
    "masked_image_latents": slice(1, None),
    "masked_image": slice(None, -1),
    "mask_image": slice(-1, None),
}


class Callbacks:
    """Called by the loop after each call of the network; hands tensors to the caller's callbacks and takes them back.

    `call` is the arguments of a family, `pipe` the pipeline whose `_guidance_scale` and `_interrupt` a callback may set.
    """

    def __init__(self, pipe: Any, call: Any, run: Run):
        self.pipe, self.call, self.run = pipe, call, run
        self.names = call.callback_on_step_end_tensor_inputs
        if isinstance(call.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            self.names = call.callback_on_step_end.tensor_inputs

    def __call__(self, k: int, before: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
        schedule = self.run.schedule
        t = schedule.timesteps[k]
        if self.call.callback_on_step_end is not None:
            given = {name: self._tensor(name, k, before, prediction, latents) for name in self.names}
            scales = getattr(self.pipe, "_ip_scales", None)
            changed = self.call.callback_on_step_end(self.pipe, k, t, dict(given)) or {}
            latents = changed.get("latents", latents)
            self._take({n: v for n, v in changed.items() if n != "latents" and v is not given.get(n)})
            self.run.guidance_scale = self.pipe.guidance_weight
            if getattr(self.pipe, "_ip_scales", None) is not scales:
                self.pipe.rescale(self.run)
        step = schedule.step_of_call[k]
        if self.call.callback is not None and schedule.ends_step(k) and step % (self.call.callback_steps or 1) == 0:
            self.call.callback(step, t, latents)
        self.run.stop = self.pipe._interrupt
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
        if name in _CHANNELS and self.run.channels is not None:
            return self.run.channels[:, _CHANNELS[name]]
        if name in _CHANNELS:
            return self.run.rule[1]["mask"] if name == "mask" and self.run.rule is not None else before.new_zeros(0)
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
            elif name in _CHANNELS:
                self._take_mask(name, value[-rows:])
            elif name in run.conditioning:
                run.conditioning = {**run.conditioning, name: value}
        if changed:
            run.forget()

    def _take_mask(self, name: str, value: Tensor) -> None:
        run = self.run
        if run.channels is not None:
            run.channels = run.channels.clone()
            run.channels[:, _CHANNELS[name]] = value
        if run.rule is not None and name in ("mask", "mask_image"):
            mask = value if name == "mask" else 1 - value
            run.rule = (run.rule[0], {**run.rule[1], "mask": mask})
