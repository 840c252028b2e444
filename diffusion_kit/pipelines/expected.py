"""How much memory a picture takes beside the weights, known before one is made: networks of the same configurations run
without values, and the bytes of tensors that live at once are counted."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from diffusers import Kandinsky3UNet, ModelMixin, UNet2DConditionModel
from torch import Tensor

from diffusion_kit.models.attention import installed
from diffusion_kit.models.denoiser import control_channels, make_denoiser
from diffusion_kit.models.live import Live
from diffusion_kit.models.unet import obstacle
from diffusion_kit.models.vae import Decoder
from diffusion_kit.models.valueless import valueless
from diffusion_kit.sampling.doors import Answer, at_once

TOKENS, IDS = 77, 6  # of CLIP's texts; sizes and crops that SDXL is told


def working_memory(pipe: Any) -> tuple[int, int] | None:
    """Most bytes at once, beside the weights, in a guided step and in decoding of one picture of the pipeline's own size,
    as far as torch knows of them: what libraries use inside an operation is not in it. None for networks of other kinds."""
    unet, vae = pipe.unet, getattr(pipe, "vae", None)
    if not (isinstance(vae, ModelMixin) and isinstance(unet, (UNet2DConditionModel, Kandinsky3UNet))):
        return None
    size = tuple(side // pipe.vae_scale_factor for side in pipe.native_size)
    shape, device = (vae.config.latent_channels, *size), str(pipe._execution_device)
    upcast = pipe.upcasts and vae.dtype == torch.float16 and vae.config.get("force_upcast")
    step = _of_step(*_configured(unet), unet.dtype, device, shape)
    decoding = _of_decoding(*_configured(vae), torch.float32 if upcast else vae.dtype, device, shape)
    return None if step is None else (step, decoding)


def _configured(net: Any) -> tuple[Any, str]:
    """A network's class and configuration, but for how its weights were quantised."""
    own = {name: value for name, value in net.config.items() if name[0] != "_" and name != "quantization_config"}
    return type(net), json.dumps(own, sort_keys=True)


@cache
def _of_step(cls: Any, configuration: str, dtype: torch.dtype, device: str, shape: tuple[int, ...]) -> int | None:
    with valueless(cls, configuration, dtype, device) as net:
        if obstacle(net) is not None:
            return None
        rows = 2 if net.config.get("time_cond_proj_dim") is None else 1  # one that is told the scale has one branch
        channels = net.config.in_channels - control_channels(net, shape[0])  # more than the latents' for inpainting
        denoiser, conditioning = make_denoiser(net, shape[0]), blank(net, rows)
        x = torch.empty(rows, channels, *shape[1:], dtype=dtype)
        with Live([x, *conditioning.values(), *tensors_of(net)]) as live, installed(net):
            denoiser(at_once(denoiser.prepare(torch.zeros(1), conditioning)), x, Answer())
    return live.peak


@cache
def _of_decoding(cls: Any, configuration: str, dtype: torch.dtype, device: str, shape: tuple[int, ...]) -> int:
    with valueless(cls, configuration, dtype, device) as vae:
        latents = torch.empty(1, *shape, dtype=dtype)
        with Live([latents, *tensors_of(vae)]) as live:
            Decoder(vae)(latents, {})
    return live.peak


def tensors_of(net: Any) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


def blank(net: Any, rows: int) -> dict[str, Tensor]:
    """Conditioning of the shapes that a UNet takes."""
    config: Any = net.config
    added: Any = getattr(net, "add_embedding", None)
    sizes: dict[str, tuple[int, ...]] = {}
    if isinstance(net, Kandinsky3UNet):
        sizes = {"prompt_embeds": (TOKENS, config.encoder_hid_dim), "attention_mask": (TOKENS,), "spans": (TOKENS,)}
        return {name: torch.ones(rows, *own) for name, own in sizes.items()}
    sizes["prompt_embeds"] = (TOKENS, config.encoder_hid_dim or config.cross_attention_dim)
    kind = config.addition_embed_type
    if kind == "text_time":
        sizes["add_text_embeds"] = (added.linear_1.in_features - IDS * config.addition_time_embed_dim,)
        sizes["add_time_ids"] = (IDS,)
    elif kind == "text_image":
        sizes["add_text_embeds"] = (added.text_proj.in_features,)
    if kind in ("text_image", "image", "image_hint"):
        sizes["image_embeds"] = (added.image_proj.in_features,)
    if config.time_cond_proj_dim is not None:
        sizes["timestep_cond"] = (config.time_cond_proj_dim,)
    return {name: torch.ones(rows, *own) for name, own in sizes.items()}
