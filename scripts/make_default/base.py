"""Train the UNet and both text encoders. `torchrun --nproc_per_node 2 base.py`"""

from __future__ import annotations

from collections.abc import Iterator

import data
import latents
import loop
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTHS = (96, 128, 192)
STEPS = 1000
SCHEDULE = {
    "num_train_timesteps": STEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}


def build_text(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=tokenizer.TOKENS,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.TOKENS - 2,
        eos_token_id=tokenizer.TOKENS - 1,
        pad_token_id=tokenizer.TOKENS - 1,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=data.SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // 32 for width in WIDTHS),  # the number of heads
        cross_attention_dim=192,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
    )


def build() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(build_text(64, 3)),
            "text_encoder_2": CLIPTextModelWithProjection(build_text(128, 4)),
            "unet": build_unet(),
        }
    )


def encode_text(base: nn.ModuleDict, ids: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (b, 24) to context (b, 24, 192) and pooled (b, 128); zeros where `zero` (b)."""
    one = base["text_encoder"](ids, output_hidden_states=True)
    two = base["text_encoder_2"](ids, output_hidden_states=True)
    context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    keep = (~zero).to(context.dtype)
    return context * keep[:, None, None], two.text_embeds * keep[:, None]


def added(pooled: Tensor) -> dict[str, Tensor]:
    """The added conditions of SDXL: every picture is 64x64, uncropped."""
    size = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return {"text_embeds": pooled, "time_ids": size.expand(len(pooled), 6)}


def noised(scheduler: DDIMScheduler, clean: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to predict, both (b, 4, 16, 16)."""
    noise = torch.randn_like(clean)
    return scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)


Batch = tuple[Tensor, Tensor, Tensor]


def shares(icons: data.Icons) -> np.ndarray:
    """How often each drawing is taken, relative to the others (n,)."""
    starred = data.concepts(starred=True)
    # A prompt without a style word means the 3d drawings: these are drawn more often.
    solid = np.array([6.0 if style == "3d" else 1.0 for style in icons.styles])
    return solid * np.array([4.0 if slug in starred else 1.0 for slug in icons.slugs])


def batches(plan: loop.Plan) -> Iterator[Batch]:
    """Latents (b, 4, 16, 16), token ids (b, 24), whose condition is zeros (b)."""
    cache, words = latents.load(), tokenizer.load()
    rows, rng = cache.captioned(), np.random.default_rng()
    share = shares(cache.icons)[cache.about["index"][rows]]
    share = share * np.where(cache.about["moved"][rows], 1, 4)
    share /= share.sum()
    while True:
        chosen = rng.choice(rows, plan.batch, p=share)
        captions = [cache.caption(int(row), rng) for row in chosen]
        dropped = rng.random(plan.batch)
        captions = ["" if d < 0.1 else text for d, text in zip(dropped, captions, strict=True)]
        ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = torch.from_numpy(cache.latents[chosen].astype(np.float32))
        yield clean, ids, torch.from_numpy(dropped < 0.05)


def objective(scheduler: DDIMScheduler, base: nn.ModuleDict, batch: Batch) -> Tensor:
    clean, ids, zero = batch
    # Shapes are decided at middle noise: four in five times are taken from there.
    middle = torch.sigmoid(torch.randn(len(clean)) + 0.3)
    t = torch.where(torch.rand(len(clean)) < 0.8, middle, torch.rand(len(clean)))
    t = (t * STEPS).long().clamp(max=STEPS - 1)
    noisy, velocity = noised(scheduler, clean, t)
    # The fused attention is slow backwards on so few tokens.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        context, pooled = encode_text(base, ids, zero)
        made = base["unet"](noisy, t, context, added_cond_kwargs=added(pooled)).sample
    return F.mse_loss(made.float(), velocity)


if __name__ == "__main__":
    plan = loop.arguments("base", minutes=67, batch=24, rate=8e-4)
    plan.average = 0.996
    scheduler = DDIMScheduler(**SCHEDULE)
    loop.train(plan, build(), batches(plan), lambda base, batch: objective(scheduler, base, batch))
