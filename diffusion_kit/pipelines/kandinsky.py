"""Kandinsky 2.1 and 2.2 (Razzhigaev et al. 2023, arXiv 2310.03502): the decoders, which make a picture of an image
embedding (and 2.1 of a prompt), in three tasks, with any controls. Where embeddings come from: see `kandinsky_prior`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import XLMRobertaTokenizer

from diffusion_kit.adapters.control import Control
from diffusion_kit.models.denoiser import takes_hint
from diffusion_kit.sampling.doors import spread
from diffusion_kit.sampling.schedule import Schedule

from .call import LatentCall
from .canvas import Canvas
from .latent import LatentPipeline, texts
from .starts import Batch, Start, from_worn_picture

TEXT_LENGTH = 77  # tokens of 2.1's text encoder


class MoVQPipeline(LatentPipeline):
    """A family whose autoencoder is a `movq`, with sides that are multiples of 64 pixels."""

    rounding: ClassVar[str] = "up"

    def _set_up(self) -> None:
        super()._set_up()
        self.movq_scale_factor = self.vae_scale_factor
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, resample="bicubic", reducing_gap=1
        )

    @property
    def vae(self) -> Any:
        return self.movq

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor**2

    def output(self, images: Any, return_dict: bool) -> Any:
        return ImagePipelineOutput(images=images) if return_dict else (images,)


@dataclass
class Kandinsky2Call(LatentCall):
    __doc__ = f"""{LatentCall.__doc__}
    Of Kandinsky 2.x:
        image_embeds, negative_image_embeds: of a prior, (N, D), or a list of such: one for all pictures, one for each
            prompt or one for each picture.
    """

    strengths: ClassVar[tuple[float, float]] = (0.3, 1.0)

    num_inference_steps: int = 100
    guidance_scale: float = 4.0
    image_embeds: Any = None
    negative_image_embeds: Any = None

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        return [
            *super().rules(tensors),
            (
                self.image_embeds is None,
                "give image_embeds, of a prior; AutoPipelineForText2Image loads a decoder with its prior",
            ),
        ]


class Kandinsky22Call(Kandinsky2Call):
    @property
    def prompts(self) -> int:
        return len(_joined(self.image_embeds))


class Kandinsky21Call(Kandinsky2Call):
    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        return [*super().rules(tensors), (self.prompt is None, "give a prompt: Kandinsky 2.1's decoder reads it too")]


class Kandinsky2Pipeline(MoVQPipeline):
    """What both versions share."""

    blends: ClassVar[bool]  # whether an inpainting UNet's kept parts are put back after every step

    def embeddings(self, call: Kandinsky2Call, device: torch.device) -> Tensor:
        """Image embeddings, (unconditional, conditional) along the batch with guidance.

        Raises:
            ValueError: of another width than the UNet takes, or none for the unconditional half.
        """
        names = ["negative_image_embeds", "image_embeds"] if self.do_classifier_free_guidance else ["image_embeds"]
        width = self.unet.encoder_hid_proj.image_embeds.in_features
        rows = []
        for name in names:
            values = getattr(call, name)
            if values is None:
                raise ValueError(f"guidance_scale {call.guidance_scale} needs {name}; the prior gives them")
            values = _joined(values)
            if values.ndim != 2 or values.shape[1] != width:
                raise ValueError(
                    f"{name} have shape {tuple(values.shape)}, this UNet takes (N, {width}): are they of another prior?"
                )
            rows.append(spread(values.to(device, self.unet.dtype), call.prompts, call.num_images_per_prompt, name))
        return torch.cat(rows)

    def _start(self, call: Any, batch: Batch, schedule: Schedule, canvas: Canvas) -> Start:
        if canvas.mask is None or self.unet.config.in_channels != 2 * batch.shape[0] + 1:
            return super()._start(call, batch, schedule, canvas)
        return from_worn_picture(call, batch, schedule, canvas, self.encoder(batch), blends=self.blends)


class Kandinsky22Pipeline(Kandinsky2Pipeline):
    """The family of Kandinsky 2.2's decoders: a picture of `image_embeds`. `KandinskyV22ControlnetPipeline`'s UNet takes a
    `Control("hint", depth_map)`; such a UNet is also a control of a plain decoder, `Control(unet, depth_map)`."""

    Call: ClassVar[type] = Kandinsky22Call
    peer_name = "KandinskyV22Pipeline"
    blends = True
    model_cpu_offload_seq = "unet->movq"
    _callback_tensor_inputs: ClassVar[list[str]] = (
        "latents image_embeds negative_image_embeds masked_image mask_image preview"
    ).split()

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, movq: VQModel):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, movq=movq)
        self._set_up()

    def generate(self, call: Any) -> Any:
        """A control that is a UNet denoises in the place of the pipeline's own."""
        call.check(self._callback_tensor_inputs)
        controls = [] if callable(call.controls) else [self.resolve_control(own) for own in call.controls]
        worn = [own for own in controls if isinstance(own, Control) and takes_place(own)]
        if not worn:
            return super().generate(call)
        if len(worn) > 1:
            raise ValueError("two controls are decoders with a hint: one UNet denoises, give one of them")
        controls = [replace(own, model="hint") if own is worn[0] else own for own in controls]
        plain = self.unet
        if hasattr(plain, "_hf_hook"):  # which says where an offloaded network runs; the other has none
            worn[0].model.to(self._execution_device)
        self.register_modules(unet=worn[0].model)
        try:
            return super().generate(replace(call, controls=controls))
        finally:
            self.register_modules(unet=plain)

    def conditioning(self, call: Kandinsky22Call, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        return {"image_embeds": self.embeddings(call, device)}


class Kandinsky21Pipeline(Kandinsky2Pipeline):
    """The family of Kandinsky 2.1's decoders: a picture of a prompt, read by M-CLIP, and of `image_embeds`."""

    Call: ClassVar[type] = Kandinsky21Call
    peer_name = "KandinskyPipeline"
    blends = False
    model_cpu_offload_seq = "text_encoder->unet->movq"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        *Kandinsky22Pipeline._callback_tensor_inputs[1:],
    ]

    def __init__(
        self,
        text_encoder: MultilingualCLIP,
        tokenizer: XLMRobertaTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler | DDPMScheduler,
        movq: VQModel,
    ):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, movq=movq)
        self._set_up()

    def conditioning(self, call: Kandinsky21Call, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        prompts = texts(call.prompt)
        sides = [prompts]
        if self.do_classifier_free_guidance:
            sides = [texts(call.negative_prompt or "", len(prompts)), prompts]
        encoded = [self._encode(side) for side in sides]
        pooled, states = (
            torch.cat([values.repeat_interleave(call.num_images_per_prompt, 0) for values in column]).to(device)
            for column in zip(*encoded, strict=True)
        )
        return {"prompt_embeds": states, "add_text_embeds": pooled, "image_embeds": self.embeddings(call, device)}

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pooled states (N, P) and states (N, tokens, width)."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        device = get_module_execution_device(self.text_encoder)
        return self.text_encoder(input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))

    def start_level(self, call: Any, schedule: Schedule) -> tuple[float, float] | None:
        """Image-to-image starts at betas of its own, linear from 1e-4 to 2e-2, at the timestep before the last but one of
        the share: so the model's authors do it. Samplers that work on sigmas have levels of another kind."""
        if (schedule.input_scale != 1).any():
            return None
        trained = self.scheduler.config.num_train_timesteps
        kept = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, trained), 0)[max(int(trained * call.share) - 2, 0)]
        return kept.sqrt().item(), (1 - kept).sqrt().item()


def takes_place(control: Control) -> bool:
    """Whether a control is a UNet with a hint, and can act."""
    return isinstance(control.model, UNet2DConditionModel) and takes_hint(control.model) and any(control.scales)


def _joined(embeds: Any) -> Tensor:
    return torch.cat(list(embeds)) if isinstance(embeds, (list, tuple)) else embeds
