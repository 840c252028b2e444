"""The base of a training: its networks, frozen, and what they make of a batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from diffusion_kit.models.denoiser import UNetDenoiser, control_channels, takes_hint
from diffusion_kit.models.sources import load_component, locate
from diffusion_kit.models.spread import load_spread
from diffusion_kit.models.text import Layer, Text, encode_text
from diffusion_kit.models.unet import obstacle
from diffusion_kit.models.vae import scaling, statistics
from diffusion_kit.pipelines import auto, kandinsky, kandinsky_prior, sd15, sdxl
from diffusion_kit.sampling.doors import Answer, at_once

from .config import Config
from .data.cache import Cache, Maker, fingerprint
from .data.samples import Batch, Sample
from .objective import Objective, make_objective, normal

FAMILIES = (sdxl.SDXLPipeline, sd15.SD15Pipeline, kandinsky.Kandinsky22Pipeline)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of an autoencoder's latents
SILENT = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}  # of schedulers that do not say
Conditioning = dict[str, Tensor]


@dataclass
class Base:
    """A pipeline's networks as training uses them.

    Attributes:
        encoders: the text encoders with their tokenizers, in the order of the pipeline.
        prior: of a Kandinsky decoder, the prior's pipeline: its image encoder makes what the UNet is conditioned on.
        before: fingerprint of a UNet that learns, or will be spread over processes, as it was.
    """

    pipe: Any
    objective: Objective
    encoders: list[tuple[Any, Any]]
    layer: Layer
    prior: Any = None
    before: str | None = None
    retried: set[str] = field(default_factory=set)
    _black: Tensor | None = field(default=None, init=False)

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        return self.pipe.movq if hasattr(self.pipe, "movq") else self.pipe.vae

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device  # diffusers' own walks through all modules, at every call

    def denoiser(self) -> UNetDenoiser:
        channels = self.vae.config.latent_channels
        return UNetDenoiser(self.unet, channels, control_channels(self.unet, channels))

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, answer: Answer) -> Tensor:
        """What the UNet says of noisy latents (B, C, h, w) at timesteps (B,)."""
        denoiser = self.denoiser()
        tensors = at_once(denoiser.prepare(t[None], conditioning))
        return denoiser(tensors, x.to(self.unet.dtype), answer)[0]

    @property
    def pictured(self) -> list[Maker]:
        """What is made of a picture before it is noisy: its latents, and a Kandinsky decoder's embedding."""
        latents = (self.vae, [getattr(self.vae.config, name, None) for name in SCALES])
        if self.prior is None:
            return [latents]
        own = self.prior.image_processor
        return [latents, (self.prior.image_encoder, [own.image_mean, own.image_std])]

    @property
    def frozen_encoders(self) -> list[Maker]:
        """Text encoders whose answers may be kept, since they do not learn."""
        if any(p.requires_grad for _, encoder in self.encoders for p in encoder.parameters()):
            return []
        return [(net, [sorted(own.get_vocab().items()), own.model_max_length]) for own, net in self.encoders]

    def put_away(self, cache: Cache) -> None:
        """Moves what a full cache makes needless off the accelerator."""
        if cache.latents is not None:
            self.vae.to("cpu")
        if cache.text is not None:
            for _, encoder in self.encoders:
                encoder.to("cpu")

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """What was put away is on the accelerator inside the block."""
        away = [net for net in (self.vae, *(net for _, net in self.encoders)) if net.device != self.device]
        try:
            for net in away:
                net.to(self.device)
            yield
        finally:
            for net in away:
                net.to("cpu")

    # Pictures

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, h, w): mean + deviation x each place's own draw."""
        mean, deviation = self.moments(batch.samples).chunk(2, 1)
        return mean + deviation * normal(batch.places, "posterior", mean.shape[1:]).to(mean)

    def moments(self, samples: Sequence[Sample]) -> Tensor:
        """(B, 2 C, h, w) float32: scaled mean and deviation of latents, from the cache or of the pixels."""
        new = [sample for sample in samples if sample.moments is None]
        made = iter(self.encode(torch.stack([s.pixels for s in new]), [s.name for s in new]) if new else ())
        rows = [next(made) if sample.moments is None else sample.moments.to(self.device) for sample in samples]
        return torch.stack(rows)

    @torch.no_grad()
    def encode(self, pixels: Tensor, names: Sequence[str]) -> Tensor:
        """Moments of pixels (B, 3, H, W) in [-1, 1]. What overflows in half precision is made again in float32."""
        moments = self._posterior(pixels)
        if self.vae.dtype != torch.float16:
            return moments
        bad = [k for k, finite in enumerate(moments.isfinite().flatten(1).all(1).tolist()) if not finite]
        if bad:
            dtype = self.vae.dtype
            self.vae.to(torch.float32)
            moments[bad] = self._posterior(pixels[bad])
            self.vae.to(dtype)
            new = {names[k] for k in bad} - self.retried
            self.retried |= new
            if new:
                kind = str(dtype).removeprefix("torch.")
                warnings.warn(
                    f"the VAE overflowed in {kind}, made again in float32: {', '.join(sorted(new))}", stacklevel=2
                )
        return moments

    def _posterior(self, pixels: Tensor) -> Tensor:
        """In the autoencoder's own precision, whatever is trained around it."""
        kind = self.vae.device.type
        with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
            return self._in_parts(pixels)

    def _in_parts(self, pixels: Tensor) -> Tensor:
        """As few at once as memory bears."""
        try:
            return posterior(self.vae, pixels.to(self.vae.device)).to(self.device)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        return torch.cat([self._in_parts(part) for part in pixels.chunk(2)])

    # Text

    def conditioning(self, batch: Batch) -> Conditioning:
        """What the UNet sees of the captions and sizes of a batch; of a Kandinsky decoder, of the pictures themselves."""
        if self.prior is not None:
            return {"image_embeds": embedded(self.prior, batch.samples, self.device, self.black())}
        new = [sample for sample in batch.samples if sample.text is None]
        found = self.text([sample.caption for sample in new], [sample.zeros for sample in new]) if new else {}
        if len(new) < len(batch):
            made = iter(range(len(new)))
            rows = [
                {name: value[k] for k in [next(made)] for name, value in found.items()} if s.text is None else s.text
                for s in batch.samples
            ]
            dtype = self.unet.dtype  # autocast joins no mixture of half precisions on the CPU
            found = {name: torch.stack([row[name].to(self.device, dtype) for row in rows]) for name in rows[0]}
        if self.unet.config.get("addition_embed_type") == "text_time":
            found["add_time_ids"] = batch.time_ids
        return found

    def black(self) -> Tensor:
        """(D,) a black picture's embedding, which stands for none; made once of an encoder that does not learn."""
        if self._black is not None:
            return self._black
        made = self.prior.get_zero_embed(1, self.device)[0].float()
        if not any(p.requires_grad for p in self.prior.image_encoder.parameters()):
            self._black = made
        return made

    def text(self, captions: Sequence[str], zeros: Sequence[bool]) -> Conditioning:
        """`prompt_embeds` (B, tokens, width) and, with a second encoder, `add_text_embeds` (B, P); zeros where `zeros`."""
        texts = [encode_text(captions, tokenizer, encoder, self.layer) for tokenizer, encoder in self.encoders]
        found = {name: value.to(self.device) for name, value in joined(texts).items()}
        keep = ~torch.tensor(zeros, device=found["prompt_embeds"].device)
        return {name: value * keep.view(-1, *(1,) * (value.ndim - 1)) for name, value in found.items()}


def embedded(prior: Any, samples: Sequence[Sample], device: torch.device, none: Tensor | None = None) -> Tensor:
    """(B, D) image embeddings, from the cache or of the pixels; `none` (D,) without caption, if it is given."""
    new = [s.pixels for s in samples if s.embed is None and s.pixels is not None]
    made = iter(embed(prior, torch.stack(new).to(device)) if new else ())
    rows = [next(made) if sample.embed is None else sample.embed.to(device) for sample in samples]
    pairs = zip(samples, rows, strict=True)
    return torch.stack([row if none is None or not sample.dropped else none for sample, row in pairs])


def embed(prior: Any, pixels: Tensor) -> Tensor:
    """(B, D) image embeddings of pixels (B, 3, H, W) in [-1, 1], of the square in their middle."""
    own, encoder = prior.image_processor, prior.image_encoder
    side, middle = encoder.config.image_size, min(pixels.shape[-2:])
    top, left = ((length - middle) // 2 for length in pixels.shape[-2:])
    square = pixels[..., top : top + middle, left : left + middle]
    small = F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    mean, std = (small.new_tensor(values).view(1, 3, 1, 1) for values in (own.image_mean, own.image_std))
    return encoder(((small - mean) / std).to(encoder.dtype)).image_embeds.float()


def joined(texts: Sequence[Text]) -> Conditioning:
    """Both encoders' states side by side, and the last one's pooled state."""
    found = {"prompt_embeds": torch.cat([text.states for text in texts], -1)}
    if len(texts) > 1 and texts[-1].pooled is not None:
        found["add_text_embeds"] = texts[-1].pooled
    return found


def posterior(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 2 C, h, w) float32: mean and deviation of latents, scaled as the UNet sees them."""
    out = vae.encode(pixels.to(vae.dtype))
    if hasattr(out, "latent_dist"):
        mean, deviation = out.latent_dist.mean.float(), out.latent_dist.std.float()
    else:
        mean = out.latents.float()
        deviation = torch.zeros_like(mean)
    shift, std = statistics(vae, mean)
    factor = scaling(vae) / std
    return torch.cat([(mean - shift) * factor, deviation * factor], 1)


def load_base(config: Config, device: torch.device) -> Base:
    """The base's networks on the device, frozen, in the training's precision.

    Raises:
        FileNotFoundError: no such base. ValueError: a family that is not trained, or a UNet that the executor cannot run.
    """
    own = config.base
    family = auto.FAMILIES.get(auto.class_name(own.model))
    if family not in FAMILIES:
        known = ", ".join(cls.__name__.removesuffix("Pipeline") for cls in FAMILIES)
        raise ValueError(f"base.model {own.model} is of no family that can be trained; these are {known}")
    if own.vae is not None and family is kandinsky.Kandinsky22Pipeline:
        raise ValueError("base.vae is for other families: a decoder of Kandinsky 2.2 has its MoVQ")
    # bfloat16 has too few digits for an autoencoder; what learns is in float32 from the beginning
    fine = torch.float16 if config.precision == "fp16" else torch.float32
    dtypes = {"default": DTYPES[config.precision], "vae": fine, "movq": fine} | dict.fromkeys(
        learning(config), torch.float32
    )
    parts = {} if own.vae is None else {"vae": load_component(AutoencoderKL, own.vae, torch_dtype=fine)}
    parts |= spread_unet(config)
    pipe = family.from_pretrained(own.model, torch_dtype=dtypes, **parts, **hub(config))
    if (why := obstacle(pipe.unet)) is not None:
        raise ValueError(f"base.model {own.model} cannot be trained with: {why}")
    check_channels(pipe, own.model)
    frozen(pipe.to(device))
    encoders, layer = text_parts(pipe)
    prior = load_prior(config, device) if family is kandinsky.Kandinsky22Pipeline else None
    objective = make_objective(pipe.scheduler, config.objective)
    learns = "unet" in learning(config)
    tell_scheduler(pipe, objective, learns=learns)
    kept = learns or spread_in_engine(config)  # what will be changed, or no longer whole here
    return Base(pipe, objective, encoders, layer, prior, fingerprint(pipe.unet) if kept else None)


def spread_in_engine(config: Config) -> bool:
    """Whether the frozen UNet is spread over the processes: in ZeRO's stage 3, unless it is not wanted."""
    wanted = config.base.spread is not False and "unet" not in learning(config)
    return wanted and zero_settings(config).get("stage") == 3


def zero_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`, without what is left to the trainer."""
    from .parallel.settings import AUTO, read  # whose package imports this file

    own = read(config.deepspeed or {}).get("zero_optimization", {})
    return {name: value for name, value in own.items() if value != AUTO}


def spread_unet(config: Config) -> dict[str, Any]:
    """The frozen UNet of a folder, loaded in parts where it will be spread and nothing is copied from it: a target with a
    copy of its encoder has it whole at first."""
    place = locate(config.base.model)
    if config.target != "t2i_adapter" or not spread_in_engine(config) or not isinstance(place, Path):
        return {}
    own = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero_settings(config)}
    dtype, variant = DTYPES[config.precision], config.base.variant
    return {"unet": load_spread(UNet2DConditionModel, place / "unet", dtype, own, variant)}


def hub(config: Config) -> dict[str, str]:
    """Which of a hub id's files are meant."""
    found = {name: getattr(config.base, name) for name in ("revision", "variant")}
    return {name: value for name, value in found.items() if value is not None}


def learning(config: Config) -> set[str]:
    """The components of base and prior that a target trains."""
    encoders = {"text_encoder", "text_encoder_2", "image_encoder"} if config.network.get("encoders") else set()
    return {
        "unet": {"unet", *encoders},
        "hint_decoder": {"unet"},
        "prior": {"prior"},
    }.get(config.target, set())


def as_given(pipe: Any, source: str, config: Config) -> Any:
    """A pipeline of which networks have learned, the others as their files have them, whatever they were run in."""
    if config.precision == "no":
        return pipe
    learned = learning(config)
    parts = {n: p for n, p in pipe.components.items() if n in learned or not isinstance(p, nn.Module)}
    if config.base.vae is not None and "vae" in pipe.components:
        parts["vae"] = load_component(AutoencoderKL, config.base.vae)
    own = source == config.base.model or config.target == "prior"  # else a prior's files beside the base's
    return type(pipe).from_pretrained(source, **parts, **(hub(config) if own else {}))


def check_channels(pipe: Any, name: str) -> None:
    """
    Raises:
        ValueError: a UNet that sees more than noisy latents and a Kandinsky decoder's hint.
    """
    taken, channels = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if pipe.unet.config.get("addition_embed_type") == "text_time" and getattr(pipe, "text_encoder", None) is None:
        raise ValueError(f"base.model {name} is a refiner, which no target trains: take its base")
    if taken != channels and not takes_hint(pipe.unet):
        raise ValueError(
            f"base.model {name} is for inpainting or editing: its UNet takes {taken} channels; a training starts from one "
            f"that takes the {channels} of the latents alone"
        )


def tell_scheduler(pipe: Any, objective: Objective, *, learns: bool) -> None:
    """Gives a pipeline the scheduler of what its UNet learns to predict, with which it is shown and saved.

    Raises:
        ValueError: it does not learn, and predicts something else.
    """
    own = pipe.scheduler
    told = {"prediction_type": objective.prediction, "rescale_betas_zero_snr": objective.zero_snr}
    if told == {name: own.config.get(name, default) for name, default in SILENT.items()}:
        return
    if not learns:
        raise ValueError(
            "objective.prediction and zero_terminal_snr are the base's own where it is frozen: leave them out"
        )
    spacing = {"timestep_spacing": "trailing"} if objective.zero_snr else {}  # begins at pure noise
    known = "rescale_betas_zero_snr" in inspect.signature(type(own).__init__).parameters
    cls = DDIMScheduler if objective.zero_snr and not known else type(own)  # others would sample another schedule
    pipe.register_modules(scheduler=cls.from_config({**own.config, **told, **spacing}))


def load_prior(config: Config, device: torch.device) -> Any:
    """The prior of Kandinsky 2.2, frozen.

    Raises:
        ValueError: it was not named.
    """
    if config.base.prior is None:
        raise ValueError("base.prior is missing: name the prior of Kandinsky 2.2, whose image encoder is needed")
    dtypes = {"default": DTYPES[config.precision]} | dict.fromkeys(learning(config), torch.float32)
    own = hub(config) if config.target == "prior" else {}  # else they are those of base.model
    return frozen(
        kandinsky_prior.PriorPipeline.from_pretrained(config.base.prior, torch_dtype=dtypes, **own).to(device)
    )


def frozen(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def text_parts(pipe: Any) -> tuple[list[tuple[Any, Any]], Layer]:
    """(tokenizer, encoder) pairs and the layer whose states the family takes."""
    if isinstance(pipe, sdxl.SDXLPipeline):
        pairs = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
        return [pair for pair in pairs if pair[1] is not None], Layer(1, normed=False)
    if isinstance(pipe, sd15.SD15Pipeline):
        return [(pipe.tokenizer, pipe.text_encoder)], Layer(0, normed=True)
    return [], Layer(0, normed=False)
