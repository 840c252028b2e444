"""Attention on a CPU as oneDNN's products: over tiles of queries, and in bfloat16, where a head's scores are few, over many
heads at once.

torch's own takes its products from MKL, which on processors with AVX-512 that are not Intel's reaches half of what oneDNN
does; here a tile of scores lies in the cache. On others, torch's own is up to twice as fast as this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .onednn import MKL_IS_FAST, obstacle, product

SCORES = 2**19  # of a tile, that stay in a core's cache
AT_ONCE = 2**22  # of heads that are taken together
FEWEST, FEWEST_AT_ONCE = 128, 64  # queries and keys; below, torch's own is as fast


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V for (B, heads, queries or keys, d); with a bias, for gradients or few tokens, where
    oneDNN cannot or MKL is as fast, it is torch's own."""
    queries, keys = query.shape[2], key.shape[2]
    together = query.dtype == torch.bfloat16 and queries * keys <= SCORES
    few = min(queries, keys) < (FEWEST_AT_ONCE if together else FEWEST)
    if few or bias is not None or torch.is_grad_enabled() or not _is_faster(query):
        return F.scaled_dot_product_attention(query, key, value, bias)
    q, k, v = (own.contiguous().flatten(0, 1) for own in (query, key, value))
    out = torch.empty_like(q)
    if together:
        _by_heads(q, k, v, out, max(1, AT_ONCE // (queries * keys)))
    else:
        _by_tiles(q, k, v, out, max(1, SCORES // keys))
    return out.view_as(query)


def _is_faster(query: Tensor) -> bool:
    return query.device.type == "cpu" and obstacle(query.dtype) is None and not MKL_IS_FAST[query.dtype]


def _by_heads(q: Tensor, k: Tensor, v: Tensor, out: Tensor, heads: int) -> None:
    """torch's batched products, which are oneDNN's in bfloat16."""
    for queries, keys, values, result in zip(*(whole.split(heads) for whole in (q, k, v, out)), strict=True):
        scores = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
        torch.bmm(torch.softmax(scores, -1), values, out=result)


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int) -> None:
    q, v = q * q.shape[-1] ** -0.5, v.mT.contiguous()
    for head in range(len(q)):
        for tile, result in zip(q[head].split(rows), out[head].split(rows), strict=True):
            result.copy_(product(torch.softmax(product(tile, k[head]), -1), v[head]))
