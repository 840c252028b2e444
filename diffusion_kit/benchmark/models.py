"""Networks with random weights, and what they are given."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cases import WIDTHS, Case

TOKENS, STATES, POOLED = 77, 2048, 1280  # of SDXL's text encoders, whose embeddings are given
GAIN = 0.05  # of output layers that start at zero: what they add is seen, and drowns nothing


def model_folder(case: Case, root: Path) -> Path:
    """A pipeline's folder with random weights of the case's type, and beside it those of its controls; made where it is not
    there."""
    folder = root / f"sdxl-{case.width}-{case.dtype}"
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        # In another process, whose memory is free afterwards, and whose default dtype nobody else has.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(_save_model, WIDTHS[case.width], case.dtype, part).result()
        part.rename(folder)
    return folder


def _save_model(width: int, name: str, folder: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        T2IAdapter,
        UNet2DConditionModel,
    )

    torch.set_default_dtype(getattr(torch, name))
    torch.manual_seed(0)
    channels = (width, 2 * width, 4 * width)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=tuple(max(1, own // 64) for own in channels),  # heads, under a name of diffusers' own
        cross_attention_dim=STATES,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=POOLED + 6 * 256,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    pipe = StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, add_watermarker=False, **parts)
    own = [*channels, channels[-1]]
    adapter = T2IAdapter(channels=own, num_res_blocks=2, downscale_factor=16, adapter_type="full_adapter_xl")
    _shaken(ControlNetModel.from_unet(unet)).save_pretrained(folder / "more/controlnet")
    pipe.save_pretrained(folder)
    adapter.save_pretrained(folder / "more/t2i_adapter")


def _shaken(net: Any) -> Any:
    """With random output layers in place of zeros."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=GAIN / layer.in_channels**0.5)
    return net


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Embeddings of a call, and the control picture (1, 3, H, W) in [0, 1]: white rings on black."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(case.batch, *shape, generator=generator).to(case.device, dtype)

    across = torch.linspace(-1, 1, 8 * case.side)
    rings = (torch.sin(20 * (across[:, None] ** 2 + across[None] ** 2)) > 0.9).float()
    return {
        "prompt_embeds": random(TOKENS, STATES),
        "negative_prompt_embeds": random(TOKENS, STATES),
        "pooled_prompt_embeds": random(POOLED),
        "negative_pooled_prompt_embeds": random(POOLED),
        "picture": rings.expand(1, 3, -1, -1).clone(),
    }
