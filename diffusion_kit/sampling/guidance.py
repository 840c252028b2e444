"""Classifier-free guidance and the embedding of its scale."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(prediction: Tensor, scales: Tensor, rescale: Tensor | None) -> Tensor:
    """p_0 + sum of w_k (p_k - p_{k-1}) over the branches of the batch, of which the last is conditional.

    Args:
        prediction: ((n + 1) B, C, H, W).
        scales: w, (n, 1, 1, 1, 1). For n = 1 it is u + w (c - u) (Ho and Salimans 2022, arXiv 2207.12598, in the form of
            Imagen's eq. 2), for n = 2 eq. 3 of Brooks et al. 2023 (arXiv 2211.09800).
        rescale: phi in [0, 1], or None: moves the standard deviation of each image back to that of the conditional
            prediction (Lin et al. 2023, arXiv 2305.08891, section 3.4).

    Returns:
        (B, C, H, W).
    """
    branches = prediction.unflatten(0, (len(scales) + 1, -1))  # (n + 1, B, C, H, W)
    guided = branches[0] + (scales * (branches[1:] - branches[:-1])).sum(0)
    if rescale is None:
        return guided
    axes = tuple(range(1, guided.ndim))
    matched = guided * (branches[-1].std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def guidance_embedding(scale: float, width: int, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding (batch, width) of w - 1 for UNets distilled with `time_cond_proj_dim` (arXiv 2210.03142)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(1e4)) / (half - 1)))
    angles = (scale - 1) * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos(), torch.zeros(width % 2)])
    return embedding.expand(batch, -1).to(device=device, dtype=dtype)
