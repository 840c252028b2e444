"""Attention on a CPU as two oneDNN products over tiles of queries.

torch's own takes its products from MKL, which on processors with AVX-512 that are not Intel's reaches half of what oneDNN
does; here a tile of scores lies in the cache. On others, torch's own is twice as fast as this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .onednn import MKL_IS_FAST, obstacle, product

SCORES = 2**19  # of a tile, that stay in a core's cache
FEWEST = 128  # queries and keys; below, torch's own is as fast


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V for (B, heads, queries or keys, d); with a bias, for gradients or few tokens, where
    oneDNN cannot or MKL is as fast, it is torch's own."""
    keys, width = key.shape[2], key.shape[3]
    plain = MKL_IS_FAST or bias is not None or min(query.shape[2], keys) < FEWEST or torch.is_grad_enabled()
    if plain or query.device.type != "cpu" or obstacle(query.dtype) is not None:
        return F.scaled_dot_product_attention(query, key, value, bias)
    q = (query * width**-0.5).contiguous().flatten(0, 1)
    k, v = key.contiguous().flatten(0, 1), value.transpose(2, 3).contiguous().flatten(0, 1)
    out, rows = torch.empty_like(q), max(1, SCORES // keys)
    for head in range(len(q)):
        for tile, result in zip(q[head].split(rows), out[head].split(rows), strict=True):
            result.copy_(product(torch.softmax(product(tile, k[head]), -1), v[head]))
    return out.view_as(query)
