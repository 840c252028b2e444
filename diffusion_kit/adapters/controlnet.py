"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the UNet's encoder that sees the control image and answers
each step with a residual for every skip connection and the middle. `controlnet_union` and `control_lora` run as it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from diffusion_kit.models.denoiser import added_conditions, prepare_embeddings, text_states
from diffusion_kit.models.unet import Net, layout, obstacle
from diffusion_kit.models.unet import encode as encode_unet
from diffusion_kit.sampling.doors import Answer, Conditioning, Tree, conditional, in_every, spread

from .control import Control, EncodedControl, Site, bring, fading
from .pictures import picture_tensor

MODELS = (ControlNetModel,)


@dataclass(frozen=True)
class RunControlNet:
    """Residuals of one ControlNet in one step.

    Attributes:
        half: the network sees, and its residuals reach, the conditional branch only.
        own_forward: the network runs through its own forward (see `models.unet.obstacle`).
    """

    net: Net
    half: bool
    own_forward: bool

    @property
    def executed(self) -> tuple[Net, ...]:
        return () if self.own_forward else (self.net,)

    @property
    def in_steps(self) -> RunControlNet:
        """What of it runs in a step, the same whatever the network is shown."""
        return self

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        only_half = branches > 1 and self.half
        x = x.chunk(branches)[-1] if only_half else x
        outputs = self._peer(tensors, x) if self.own_forward else self._executor(tensors, x)
        if self.net.config.global_pool_conditions:
            outputs = [output.mean((2, 3), keepdim=True) for output in outputs]
        outputs = [(weight * output).to(x) for weight, output in zip(tensors["weights"], outputs, strict=True)]
        if only_half:
            outputs = [torch.cat([torch.zeros_like(output)] * (branches - 1) + [output]) for output in outputs]
        return Answer(skips=tuple(outputs[:-1]), mid=outputs[-1])

    def _executor(self, tensors: Tree, x: Tensor) -> list[Tensor]:
        emb = tensors["emb"]
        h, skips = encode_unet(self.net, x.to(emb.dtype), emb, tensors["context"], hint=tensors["hint"])
        convolutions = [*self.net.controlnet_down_blocks, self.net.controlnet_mid_block]
        return [conv(value) for conv, value in zip(convolutions, [*skips, h], strict=True)]

    def _peer(self, tensors: Tree, x: Tensor) -> list[Tensor]:
        skips, mid = self.net(
            x.to(self.net.dtype),
            tensors["timesteps"],
            encoder_hidden_states=tensors["prompt_embeds"],
            added_cond_kwargs=added_conditions(tensors) or None,
            return_dict=False,
            **self.shown(tensors["image"]),
        )
        return [*skips, mid]

    def shown(self, image: Tensor) -> dict[str, Any]:
        """The control image as arguments of the network's own forward."""
        return {"controlnet_cond": image}

    @property
    def embedding(self) -> tuple[Net, ...]:
        """What `embed` runs."""
        return (self.net.controlnet_cond_embedding,)

    def embed(self, image: Tensor) -> Tensor:
        """What the executor adds after the network's first convolution, (N, C, h, w), of control images (N, ...)."""
        return embed(self.net, image)

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        """What the executor needs of timesteps and text."""
        return prepare_embeddings(self.net, timesteps, conditioning)


@dataclass(frozen=True)
class Embedding:
    """What a ControlNet makes of its control image before the first step."""

    run: RunControlNet

    @property
    def executed(self) -> tuple[Net, ...]:
        return self.run.embedding

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.run.embed(pixels)


@dataclass
class EncodedControlNet(EncodedControl):
    """`image` and `hint` have a row for each picture; `hint` is the control image's embedding inside the network, which
    `run` makes before the steps. `base` is the UNet, whose text the network sees."""

    injection: RunControlNet
    run: Any = None
    base: Net = None
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    hint: Tensor | None = None
    neutral: Tensor | None = None
    weights: tuple[Tensor, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()  # of a picture's residuals

    def show(self, image: Tensor) -> None:
        """Replaces the control image, (B, C, H, W) in [0, 1] or with both halves of the guidance batch."""
        self.image = image[-len(self.image) :].to(self.image)
        if self.hint is not None:
            self.hint = self.run.embed(self.image)

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        if self.injection.half:
            conditioning, branches = conditional(conditioning, len(self.image)), 1
        conditioning = {**conditioning, "prompt_embeds": text_states(self.base, conditioning)}
        weights = tuple(in_every(weight, branches) if len(weight) > 1 else weight for weight in self.weights)
        if self.hint is not None:
            prepared = self.run.prepare(self.timesteps, conditioning)
            hint = in_every(self.hint, branches)
            if self.neutral is not None and branches > 1:
                hint = torch.cat([self.neutral.expand_as(self.hint), hint[len(self.hint) :]])
            return {**prepared, "hint": hint, "weights": weights}
        states: dict[str, Any] = {
            k: v.to(self.image.dtype) if k == "prompt_embeds" else v for k, v in conditioning.items()
        }
        image = in_every(self.image, branches)
        return {**states, "timesteps": self.timesteps, "image": image, "weights": weights}

    def silence(self, branches: int) -> Answer:
        rows = branches * len(self.image)
        *skips, mid = (self.image.new_zeros(rows, *shape, dtype=self.base.dtype) for shape in self.shapes)
        return Answer(skips=tuple(skips), mid=mid)


def encode(control: Control, site: Site) -> EncodedControl:
    """Embeds the control image once; what follows in a step is the encoder and its output convolutions."""
    channels = control.model.config.get("conditioning_channels", 3)
    return encoded(
        RunControlNet, control, site, picture_tensor(control.image, site.height, site.width, channels=channels)
    )


def encoded(cls: type[RunControlNet], control: Control, site: Site, pixels: Tensor, **fields: Any) -> EncodedControlNet:
    """A network that runs as a ControlNet does, by an injection of the class; `pixels` are its control images (N, ...)."""
    net = control.model
    _check_fit(net, site)
    bring(net, site.device)
    pixels = pixels.to(site.device, net.dtype)
    pooled = net.config.global_pool_conditions
    run = cls(net, pooled or control.mode != "balanced", obstacle(net) is not None, **fields)
    guided = control.guidance is not None and not run.own_forward and not run.half
    embed = site.engine.network(Embedding(run))
    hint = None if run.own_forward else spread(embed(pixels), site.prompts, site.per_prompt, "a control's image")
    image = spread(pixels, site.prompts, site.per_prompt, "a control's image")
    places, _ = layout(site.unet, site.latent_size)
    fades = fading(len(places), "balanced" if pooled else control.mode)
    weights = site.weights(control, fades, range(len(places)), control.level_scales(site.levels))
    return EncodedControlNet(
        injection=run.in_steps,
        run=run,
        window=(control.start, control.end),
        base=site.unet,
        timesteps=site.timesteps,
        image=image,
        hint=hint,
        guidance=control.guidance if guided else None,
        neutral=embed(torch.full_like(pixels[:1], control.background)) if guided else None,
        weights=tuple(weight.to(net.dtype) for weight in weights),
        shapes=tuple((channels, *((1, 1) if pooled else size)) for _, channels, size in places),
    )


def embed(net: Net, pixels: Tensor) -> Tensor:
    """The control image's embedding (N, C, h, w), which is added after the network's first convolution."""
    flipped = net.config.controlnet_conditioning_channel_order == "bgr"
    return net.controlnet_cond_embedding(pixels.flip(1) if flipped else pixels)


def _check_fit(net: Net, site: Site) -> None:
    has, takes = ([p[1] for p in layout(n, site.latent_size)[0]] for n in (net, site.unet))
    if has != takes:
        raise ValueError(
            f"this ControlNet does not fit the base: its residuals have {has} channels, the UNet takes {takes}"
        )
    width, base_width = net.config.cross_attention_dim, site.unet.config.cross_attention_dim
    if width != base_width:
        raise ValueError(
            f"this ControlNet does not fit the base: it reads text of width {width}, the base's is {base_width}"
        )
    downscale = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    if (site.height // downscale, site.width // downscale) != site.latent_size:
        raise ValueError(
            f"this ControlNet does not fit the base: it scales its image down by {downscale}, "
            f"the base {site.height} x {site.width} pixels to {site.latent_size[0]} x {site.latent_size[1]}"
        )


def from_file(file: str | Path, *, torch_dtype: torch.dtype | None = None) -> ControlNetModel:
    """A ControlNet from a .safetensors file, in the original layout or in diffusers'.

    Raises:
        ValueError: it is cut short, or something else.
    """
    tensors = load_file(file)
    weights = convert_controlnet_checkpoint(tensors, {"layers_per_block": 2})
    for name, value in tensors.items():  # of SDXL: the peer's conversion leaves them out
        if match := ADDED.fullmatch(name):
            weights[f"add_embedding.linear_{1 + int(match[1]) // 2}.{match[2]}"] = value
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return built(ControlNetModel, lambda: encoder_config(shapes), weights, f"{file} is no ControlNet").to(torch_dtype)


def built(cls: Any, config: Callable[[], dict[str, Any]], weights: Mapping[str, Tensor], wrong: str) -> Any:
    """A network of the class with these weights.

    Raises:
        ValueError: beginning with `wrong`: its configuration cannot be read from them, or they are others.
    """
    try:
        with torch.device("meta"):
            net = cls(**config())
    except KeyError as error:
        raise ValueError(f"{wrong} that is known without its config.json: it has no {error}") from None
    takes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    differs = sorted(takes.items() ^ {(name, tuple(value.shape)) for name, value in weights.items()})
    if differs:
        raise ValueError(f"{wrong}: {differs[0][0]} is missing, one too many or of another shape")
    net.load_state_dict(weights, assign=True)
    return net.eval()


ADDED = re.compile(r"(?:control_model\.)?label_emb\.0\.([02])\.(weight|bias)")
FILES = {"controlnet": from_file}


def encoder_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration of a ControlNet in diffusers' layout, by the shapes of its tensors.

    They do not tell the number of attention heads: where projections are linear (SD 2.x, SDXL) heads are 64 wide, else
    there are 8 (SD 1.x).

    Raises:
        KeyError: a tensor is missing.
    """
    levels = range(count(shapes, "down_blocks."))
    channels = tuple(shapes[f"down_blocks.{k}.resnets.0.conv1.weight"][0] for k in levels)
    depths = [count(shapes, f"down_blocks.{k}.attentions.0.transformer_blocks.") for k in levels]
    linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    config = {
        **hint_config(shapes),
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, "down_blocks.0.resnets."),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "transformer_layers_per_block": (
            *(max(depth, 1) for depth in depths[:-1]),
            count(shapes, "mid_block.attentions.0.transformer_blocks."),
        ),
        "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": tuple(width // 64 for width in channels) if linear else 8,
    }
    if "add_embedding.linear_1.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        }
    return config


def hint_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The part of it that is about the control image."""
    first = shapes["controlnet_cond_embedding.conv_in.weight"]
    widened = range(1, count(shapes, "controlnet_cond_embedding.blocks."), 2)
    widths = (first[0], *(shapes[f"controlnet_cond_embedding.blocks.{k}.weight"][0] for k in widened))
    return {"conditioning_channels": first[1], "conditioning_embedding_out_channels": widths}


def count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many parts there are under a name such as "down_blocks."."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
