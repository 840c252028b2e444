"""Kandinsky's priors (Razzhigaev et al. 2023, arXiv 2310.03502): from prompts, or from prompts and pictures, to the image
embeddings that the decoders of `kandinsky` make pictures of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from diffusion_kit.adapters.pictures import as_list, eight_bit
from diffusion_kit.models.prior import make_prior_denoiser, obstacle
from diffusion_kit.models.text import Layer, encode_text
from diffusion_kit.sampling.doors import spread
from diffusion_kit.sampling.loop import Run
from diffusion_kit.sampling.schedule import Schedule, make_schedule

from .base import ControlledPipeline
from .call import LatentCall
from .callbacks import Callbacks
from .latent import texts
from .peers import need
from .starts import Batch, from_noise, from_picture

ARGUMENTS = (
    "prompt negative_prompt num_images_per_prompt num_inference_steps generator latents guidance_scale output_type"
    " return_dict"
)


@dataclass
class PriorCall(LatentCall):
    """Makes image embeddings (N, D) of prompts.

    Attributes:
        prompt: text, or a list of texts.
        image: what Emb2Emb starts from: a PIL picture, a tensor (N, 3, H, W) as the image processor makes them, image
            embeddings (N, D), or a list of such: one, one for each prompt or one for each result.
        strength: share of the steps that Emb2Emb runs, in (0, 1].
        negative_prompt: what guidance leads away from; its own embeddings are the negative ones of the result. Without it
            those are a black picture's.
        generator: one; or one for each result, which serves its negative embedding too.
        latents: noise to start from, (N, D); with negative prompts (2 N, D).
        guidance_scale: w of classifier-free guidance, off at 1.
        output_type: "pt" or "np".
        callback_on_step_end: as in other families.

    Returns:
        An output with `image_embeds` and `negative_image_embeds`, both (N, D), or a tuple where `return_dict=False`.

    Raises:
        TypeError: an unknown argument. ValueError: a value that is out of range or does not fit.
    """

    strengths: ClassVar[tuple[float, float]] = (0.3, 0.3)

    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    output_type: str = "pt"

    def rules(self, tensors: Sequence[str]) -> list[tuple[bool, str]]:
        return [
            (not _are_texts(self.prompt), f"prompt is {self.prompt!r}; it must be text or a list of texts"),
            (
                self.negative_prompt is not None and not _are_texts(self.negative_prompt),
                f"negative_prompt is {self.negative_prompt!r}; it must be text or a list of texts",
            ),
            (self.output_type not in ("pt", "np"), f"output_type is {self.output_type!r}; it must be 'pt' or 'np'"),
            (bool(self.controls), "a prior takes no controls: give them to the decoder"),
            *super().rules(tensors),
        ]


class PriorPipeline(ControlledPipeline):
    """The family: a transformer denoises an image embedding under a text."""

    Call: ClassVar[type] = PriorCall
    model_cpu_offload_seq = "text_encoder->image_encoder->prior"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["prior"]
    _callback_tensor_inputs: ClassVar[list[str]] = "latents prompt_embeds text_encoder_hidden_states text_mask".split()

    def __init__(
        self,
        prior: PriorTransformer,
        image_encoder: CLIPVisionModelWithProjection,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        scheduler: UnCLIPScheduler,
        image_processor: CLIPImageProcessor,
    ):
        super().__init__()
        self.register_modules(
            prior=prior,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            image_processor=image_processor,
        )
        self._guidance_scale, self._guidance_rescale = PriorCall.guidance_scale, 0.0
        self._interrupt, self._num_timesteps = False, 0
        self._cross_attention_kwargs: dict[str, Any] | None = None

    @property
    def unet(self) -> Any:
        """The network that is denoised with, under the name that families share."""
        return self.prior

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self.prior.config.embedding_dim

    @property
    def obstacle(self) -> str | None:
        return obstacle(self.prior)

    def generate(self, call: PriorCall) -> KandinskyPriorPipelineOutput | tuple[Any, Any]:
        call.check(self._callback_tensor_inputs)
        self._guidance_scale, self._interrupt = call.guidance_scale, False
        prompts, negatives = texts(call.prompt), []
        if call.negative_prompt is not None:
            negatives = texts(call.negative_prompt, len(prompts))
        schedule = make_schedule(
            self.scheduler,
            call.num_inference_steps,
            strength=None if call.image is None else call.share,
            device=self._execution_device,
        )
        self._num_timesteps = schedule.calls
        batch = self._batch(call, len(prompts), len(negatives))
        run = Run(
            schedule=schedule,
            denoiser=make_prior_denoiser(self.prior),
            conditioning=self._conditioning(prompts, negatives, call.num_images_per_prompt),
            guidance_scale=self.guidance_weight,
            guidance_interval=call.guidance_interval,
            generator=batch.generator,
            engine=self.engine,
            dtype=batch.dtype,
        )
        callbacks = Callbacks(self, call, run)

        def on_call(k: int, before: Tensor, prediction: Tensor, after: Tensor) -> Tensor:
            return _as_latents(callbacks(k, before, prediction, after[:, :, 0, 0]))

        latents = self.denoise(run, self._start(call, batch, schedule), on_call)[:, :, 0, 0]
        embeds = self.prior.post_process_latents(latents.to(batch.dtype))
        if negatives:
            embeds, negative_embeds = embeds.chunk(2)
        else:
            negative_embeds = self.get_zero_embed(len(embeds))
        if call.output_type == "np":
            embeds, negative_embeds = embeds.cpu().numpy(), negative_embeds.cpu().numpy()
        if not call.return_dict:
            return embeds, negative_embeds
        return KandinskyPriorPipelineOutput(image_embeds=embeds, negative_image_embeds=negative_embeds)

    def _batch(self, call: PriorCall, prompts: int, negatives: int) -> Batch:
        """An embedding for every prompt and, behind them, for every negative prompt."""
        n, generator = call.num_images_per_prompt, call.generator
        if negatives and isinstance(generator, (list, tuple)) and len(generator) == prompts * n:
            generator = [*generator, *generator]
        shape = (self.width, 1, 1)
        return Batch(prompts + negatives, n, shape, generator, self._execution_device, self.prior.dtype)

    def _conditioning(self, prompts: list[str], negatives: list[str], per_prompt: int) -> dict[str, Tensor]:
        """(unconditional, conditional) along the batch, or the conditional half without guidance. A negative prompt is a
        prompt too, led away from itself."""
        sides = [[*prompts, *negatives]]
        if self.do_classifier_free_guidance:
            sides.insert(0, 2 * negatives or [""] * len(prompts))
        encoded = [self._encode(side) for side in sides]
        return {
            name: torch.cat([side[name].repeat_interleave(per_prompt, 0) for side in encoded]) for name in encoded[0]
        }

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        text = encode_text(
            prompts, self.tokenizer, self.text_encoder, Layer(0, normed=True), engine=self.encoding(self.engine)
        )
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return {
            "prompt_embeds": text.pooled,
            "text_encoder_hidden_states": text.states,
            "text_mask": tokens.attention_mask.bool().to(text.states.device),
        }

    def _start(self, call: PriorCall, batch: Batch, schedule: Schedule) -> Tensor:
        """Noise, or the embeddings of `image` with noise, (B, D, 1, 1)."""
        rows = (batch.size, self.width)
        if call.image is None:
            if call.latents is not None and tuple(call.latents.shape) != rows:
                raise ValueError(f"latents have shape {tuple(call.latents.shape)}; this call needs {rows}")
            return from_noise(batch, schedule, None if call.latents is None else _as_latents(call.latents)).latents
        embeds = spread(self.embed(call.image), call.prompts, call.num_images_per_prompt, "image")
        embeds = embeds.repeat(batch.size // len(embeds), 1)  # of the negative prompts too
        return from_picture(
            batch, schedule, _as_latents(embeds), self._encode_pixels, add_noise=True, latents=None
        ).latents

    # Pictures

    def embed(self, image: Any) -> Tensor:
        """Embeddings (N, D) of pictures (PIL, or tensors (N, 3, H, W) as the image processor makes them); what is an
        embedding is left as it is.

        Raises:
            ValueError: neither, or embeddings of another width.
        """
        return torch.cat([self._embed_one(picture) for picture in as_list(image)])

    def _embed_one(self, picture: Any) -> Tensor:
        if isinstance(picture, Image.Image):
            picture = self.image_processor(eight_bit(picture), return_tensors="pt").pixel_values
        if not isinstance(picture, Tensor) or picture.ndim not in (2, 3, 4):
            what = (
                f"a tensor of shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            )
            raise ValueError(f"image is {what}; it must be a PIL picture, a tensor (N, 3, H, W) or embeddings (N, D)")
        if picture.ndim == 2 and picture.shape[1] != self.width:
            raise ValueError(f"image embeddings have shape {tuple(picture.shape)}; this prior takes (N, {self.width})")
        if picture.ndim == 2:
            return picture.to(self._execution_device, self.prior.dtype)
        return self._encode_pixels(picture if picture.ndim == 4 else picture[None])[:, :, 0, 0]

    def _encode_pixels(self, pixels: Tensor, generator: Any = None) -> Tensor:
        device = get_module_execution_device(self.image_encoder)
        return _as_latents(self.image_encoder(pixels.to(device, self.image_encoder.dtype)).image_embeds)

    def get_zero_embed(self, batch_size: int = 1, device: torch.device | None = None) -> Tensor:
        """Embedding (batch_size, D) of a black picture."""
        size = self.image_encoder.config.image_size
        return self._encode_pixels(torch.zeros(1, 3, size, size))[:, :, 0, 0].repeat(batch_size, 1).to(device)

    @torch.no_grad()
    def interpolate(
        self,
        images_and_prompts: Sequence[Any],
        weights: Sequence[float],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: Any = None,
        latents: Tensor | None = None,
        negative_prior_prompt: str | None = None,
        negative_prompt: str = "",
        guidance_scale: float = 4.0,
        device: torch.device | str | None = None,
    ) -> KandinskyPriorPipelineOutput:
        """Weighted sum of the embeddings of texts and pictures, (num_images_per_prompt, D).

        Args:
            images_and_prompts: texts, PIL pictures, tensors (1, 3, H, W) or embeddings (1, D).
            weights: one for each.
            negative_prior_prompt: what guidance leads away from for every text.
            negative_prompt: its embedding is the negative one of the result.
            device: of the result, where it is another than the pipeline's.

        Raises:
            ValueError: another number of weights; an item that is neither text nor picture.
        """
        if len(images_and_prompts) != len(weights):
            raise ValueError(
                f"{len(weights)} weights for {len(images_and_prompts)} texts and pictures: give each its own"
            )

        self.engine.renew()

        def prior(text: str) -> KandinskyPriorPipelineOutput:
            call = PriorCall(
                prompt=text,
                negative_prompt=negative_prior_prompt,
                num_images_per_prompt=num_images_per_prompt,
                num_inference_steps=num_inference_steps,
                generator=generator,
                latents=latents,
                guidance_scale=guidance_scale,
            )
            return self.generate(call)

        try:
            embeds = [
                weight * (prior(item).image_embeds if isinstance(item, str) else self.embed(item))
                for item, weight in zip(images_and_prompts, weights, strict=True)
            ]
            away = prior(negative_prompt)
        finally:
            self.maybe_free_model_hooks()
        negative_embeds = away.negative_image_embeds if negative_prompt == "" else away.image_embeds
        return KandinskyPriorPipelineOutput(
            image_embeds=self.mixed(embeds, num_images_per_prompt).to(device),
            negative_image_embeds=negative_embeds.to(device),
        )

    def mixed(self, embeds: Sequence[Tensor], rows: int) -> Tensor:
        """The sum (rows, D) of embeddings (rows or 1, D)."""
        return torch.stack([spread(own, 1, rows, "a picture") for own in embeds]).sum(0)


class KandinskyPriorPipeline(PriorPipeline):
    """Of Kandinsky 2.1."""

    arguments = ARGUMENTS
    model_cpu_offload_seq = "text_encoder->prior"

    def mixed(self, embeds: Sequence[Tensor], rows: int) -> Tensor:
        """One sum (1, D) of all, however many there are of each."""
        return torch.cat(list(embeds)).sum(0, keepdim=True)


class KandinskyV22PriorPipeline(PriorPipeline):
    """Of Kandinsky 2.2."""

    arguments = f"{ARGUMENTS} callback_on_step_end callback_on_step_end_tensor_inputs"


class KandinskyV22PriorEmb2EmbPipeline(PriorPipeline):
    """Of Kandinsky 2.2, from a picture or its embedding."""

    arguments = ARGUMENTS.replace("prompt", "prompt image strength", 1).replace(" latents", "")
    defaults: ClassVar[dict[str, Any]] = {"strength": 0.3}

    def translate(self, values: dict[str, Any]) -> dict[str, Any]:
        return need(values, type(self).__name__, "image")


def _are_texts(prompt: Any) -> bool:
    listed = as_list(prompt)
    return bool(listed) and all(isinstance(text, str) for text in listed)


def _as_latents(embeds: Tensor) -> Tensor:
    """(N, D) -> (N, D, 1, 1)"""
    return embeds[:, :, None, None]
