"""Kandinsky 3 (Arkhipkin et al. 2023, arXiv 2312.03511): text by T5, no prior; three tasks, any controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from .call import EmbedsCall
from .canvas import Canvas
from .kandinsky import MoVQPipeline
from .latent import texts
from .peers import ImageArguments

TEXT_LENGTH = 128  # tokens


@dataclass
class Kandinsky3Call(EmbedsCall):
    __doc__ = f"""{EmbedsCall.__doc__}
    Of Kandinsky 3 (`guidance_scale` w is c + w (c - u) here, as its authors write it):
        attention_mask, negative_attention_mask: which tokens of the embeddings are seen, (N, tokens).
    """

    strengths: ClassVar[tuple[float, float]] = (0.3, 1.0)

    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    attention_mask: Tensor | None = None
    negative_attention_mask: Tensor | None = None

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        own = []
        for side in ("", "negative_"):
            embeds, mask = getattr(self, f"{side}prompt_embeds"), getattr(self, f"{side}attention_mask")
            wrong = embeds is not None and (mask is None or mask.shape != embeds.shape[:2])
            own.append((wrong, f"{side}prompt_embeds need {side}attention_mask, (N, tokens) of the same size"))
        return [*super().rules(tensors), *own]


PEER = (  # the peer's order; what it does not take comes behind
    "prompt num_inference_steps guidance_scale negative_prompt num_images_per_prompt height width generator "
    "prompt_embeds negative_prompt_embeds attention_mask negative_attention_mask output_type return_dict latents "
    "callback_on_step_end callback_on_step_end_tensor_inputs"
)


TEXT_ARGUMENTS = (
    "prompt negative_prompt prompt_embeds negative_prompt_embeds attention_mask negative_attention_mask "
    "num_images_per_prompt"
).split()


class Kandinsky3Pipeline(MoVQPipeline):
    """The family of Kandinsky 3: see `Kandinsky3Call`. Its inpainting puts kept parts back after every step."""

    Call = Kandinsky3Call
    peer_name = "Kandinsky3Pipeline"
    arguments = " ".join(dict.fromkeys([*PEER.split(), *(own.name for own in fields(Kandinsky3Call))]))
    model_cpu_offload_seq = "text_encoder->unet->movq"
    native_size: ClassVar[tuple[int, int]] = (1024, 1024)
    _callback_tensor_inputs: ClassVar[list[str]] = (
        "latents prompt_embeds negative_prompt_embeds negative_attention_mask attention_mask mask preview"
    ).split()

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        unet: Kandinsky3UNet,
        scheduler: DDPMScheduler,
        movq: VQModel,
    ):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler, movq=movq)
        self._set_up()

    @property
    def guidance_weight(self) -> float:
        """c + w (c - u) is u + (w + 1) (c - u)."""
        return self._guidance_scale + 1 if self.do_classifier_free_guidance else 1.0

    def conditioning(self, call: Kandinsky3Call, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        states, negative, mask, negative_mask = self.encode_prompt(
            device=device,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            _cut_context=True,
            **{name: getattr(call, name) for name in TEXT_ARGUMENTS},
        )
        tokens = torch.arange(states.shape[1], device=mask.device)
        lengths = mask.sum(-1, keepdim=True) + 1 if call.prompt_embeds is None else states.shape[1]
        spans = (tokens < lengths).expand(len(states), -1)
        if negative is None or negative_mask is None:
            return {"prompt_embeds": states, "attention_mask": mask, "spans": spans}
        if negative.shape != states.shape:
            raise ValueError(
                f"negative_prompt_embeds have shape {tuple(negative.shape)}, prompt_embeds {tuple(states.shape)}: "
                "they must be the same"
            )
        return {
            "prompt_embeds": torch.cat([negative * spans[..., None], states]),
            "attention_mask": torch.cat([negative_mask * spans, mask]),
            "spans": torch.cat([spans, spans]),
        }

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        _cut_context: bool = False,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Text states (B, tokens, width): prompt, negative; and which tokens are seen, (B, tokens): prompt, negative.

        B is prompts x num_images_per_prompt. Without a negative prompt nothing is seen. `_cut_context` leaves out tokens
        that no prompt has.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds, attention_mask = self._encode(texts(prompt))
            if _cut_context:
                length = int(attention_mask.sum(-1).max()) + 1
                prompt_embeds, attention_mask = prompt_embeds[:, :length], attention_mask[:, :length]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            if negative_prompt is None:
                negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                negative_attention_mask = torch.zeros_like(attention_mask)  # type: ignore[arg-type]
            else:
                length = prompt_embeds.shape[1]
                negative, seen = self._encode(texts(negative_prompt, len(prompt_embeds)))
                negative_prompt_embeds, negative_attention_mask = negative[:, :length], seen[:, :length]
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype

        def spread_out(values: Tensor | None, kind: torch.dtype | None, wanted: bool = True) -> Tensor | None:
            if values is None or not wanted:
                return None
            return values.to(device, kind).repeat_interleave(num_images_per_prompt, 0)

        guided = do_classifier_free_guidance
        return (  # type: ignore[return-value]
            spread_out(prompt_embeds, dtype),
            spread_out(negative_prompt_embeds, dtype, guided),
            spread_out(attention_mask, None),
            spread_out(negative_attention_mask, None, guided),
        )

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (N, 128, width), zero where nothing is seen, and what is seen."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        device = get_module_execution_device(self.text_encoder)
        mask = tokens.attention_mask.to(device)
        return self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0] * mask[..., None], mask


class Kandinsky3Img2ImgPipeline(ImageArguments, Kandinsky3Pipeline):
    peer_name = "Kandinsky3Img2ImgPipeline"
    arguments = (
        "prompt image strength num_inference_steps guidance_scale negative_prompt num_images_per_prompt generator "
        "prompt_embeds negative_prompt_embeds attention_mask negative_attention_mask output_type return_dict "
        "callback_on_step_end callback_on_step_end_tensor_inputs"
    )
    defaults: ClassVar = {"strength": 0.3}
