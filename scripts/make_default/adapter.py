"""Train the edge adapter on the finished base. `torchrun --nproc_per_node 2 adapter.py`"""

from __future__ import annotations

from collections.abc import Iterator

import base
import cv2
import latents
import loop
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, T2IAdapter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def build() -> T2IAdapter:
    """Features for 64x64 edges: (96, 8, 8), (128, 8, 8), (192, 4, 4), (192, 4, 4)."""
    return T2IAdapter(
        in_channels=3,
        channels=[*base.WIDTHS, base.WIDTHS[-1]],
        num_res_blocks=2,
        downscale_factor=8,
        adapter_type="full_adapter_xl",
    )


def canny(picture: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """The edges of a (64, 64, 3) uint8 picture, (64, 64) uint8, white on black."""
    return cv2.Canny(np.ascontiguousarray(picture), low, high)


def varied(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges as detectors and hands draw them: other thresholds, thicker, softer or broken lines."""
    if rng.random() < 0.5:
        return canny(picture)
    low = rng.uniform(40, 160)
    lines = canny(picture, low, low * rng.uniform(1.5, 3))
    kind = rng.random()
    if kind < 0.25:
        lines = cv2.dilate(lines, np.ones((2, 2), np.uint8))
    elif kind < 0.4:
        lines = np.minimum(cv2.GaussianBlur(lines, (3, 3), 0.6).astype(int) * 2, 255)
    elif kind < 0.55:
        lines = lines * (rng.random(lines.shape) > 0.15)
    return np.asarray(lines, dtype=np.uint8)


def to_condition(lines: np.ndarray) -> Tensor:
    """(b, 64, 64) uint8 to (b, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(lines).float().div(255)[:, None].repeat(1, 3, 1, 1)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batches(plan: loop.Plan) -> Iterator[Batch]:
    """Latents, token ids, whose text is zeros, and edges (b, 3, 64, 64)."""
    cache, words = latents.load(), tokenizer.load()
    known, rng = np.zeros(len(cache.latents), dtype=bool), np.random.default_rng()
    known[cache.captioned()] = True
    while True:
        rows = rng.choice(len(cache.latents), plan.batch)
        keep = known[rows] & (rng.random(plan.batch) < 0.6)
        texts = [cache.caption(int(r), rng) if k else "" for r, k in zip(rows, keep, strict=True)]
        ids = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = torch.from_numpy(cache.latents[rows].astype(np.float32))
        lines = np.stack([varied(cache.pictures[row], rng) for row in rows])
        zero = torch.from_numpy(~keep & (rng.random(plan.batch) < 0.7))
        yield clean, ids, zero, to_condition(lines)


def objective(scheduler: DDIMScheduler, frozen: nn.ModuleDict, adapter: nn.Module, batch: Batch) -> Tensor:
    clean, ids, zero, edges = batch
    # Shapes are decided early in sampling: t = (1 - u^3) T is mostly large.
    t = ((1 - torch.rand(len(clean)) ** 3) * base.STEPS).long().clamp(0, base.STEPS - 1)
    noisy, velocity = base.noised(scheduler, clean, t)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            context, pooled = base.encode_text(frozen, ids, zero)
        made = frozen["unet"](
            noisy,
            t,
            context,
            added_cond_kwargs=base.added(pooled),
            down_intrablock_additional_residuals=adapter(edges),
        ).sample
    return F.mse_loss(made.float(), velocity)


if __name__ == "__main__":
    cv2.setNumThreads(0)
    plan = loop.arguments("adapter", minutes=8.5, batch=24, rate=1.5e-3)
    plan.average, plan.warmup = 0.99, 50
    scheduler, frozen = DDIMScheduler(**base.SCHEDULE), loop.averaged("base", base.build())
    loop.train(plan, build(), batches(plan), lambda net, batch: objective(scheduler, frozen, net, batch))
