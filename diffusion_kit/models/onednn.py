"""Products and convolutions by oneDNN on a CPU, over plain weights and over weights that lie as it computes with them.

They are the operations of torch's own compiler, but private: `obstacle` tries them before anybody relies on them. Each is
called by its overload: where torch has to find that, it first writes out why another does not fit, every tensor included.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
CPU = Path("/proc/cpuinfo")
WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
ABOUT = CPU.read_text() if CPU.is_file() else ""
# On other processors than Intel's MKL keeps to AVX2: half as fast as oneDNN where there is AVX-512, as fast where not, nor
# where AVX-512 is computed in halves in float32 (AMD's Zen 4).
HALVES = re.search(r"AuthenticAMD.*?cpu family\s*: 25\b", ABOUT, re.S) is not None
MKL_IS_FAST = {torch.bfloat16: not WIDE or "GenuineIntel" in ABOUT}
MKL_IS_FAST[torch.float32] = MKL_IS_FAST[torch.bfloat16] or HALVES
NO_ATTRIBUTE: tuple[str, list[Any], str] = ("none", [], "")  # nothing is fused behind the product


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """A B^T + bias: (..., k), (n, k) -> (..., n)."""
    return torch.ops.mkldnn._linear_pointwise.default(a, b, bias, *NO_ATTRIBUTE)


def gated(x: Tensor, value: Tensor, gate: Tensor, biases: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """(x V^T + b) * gelu(x G^T + c); where there is AVX-512, with nothing written in between. Elsewhere a product that ends
    with a factor takes up to nine times as long as one that does not."""
    opened = torch.ops.mkldnn._linear_pointwise.default(x, gate, biases[1], "gelu", [], "none")
    if WIDE:
        return torch.ops.mkldnn._linear_pointwise.binary(x, opened, value, biases[0], "mul")
    return opened.mul_(product(x, value, biases[0]))


def convolution(x: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """What the layer makes of x (B, C, H, W) with a weight that was laid out, channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise.default(x, weight, layer.bias, *geometry(layer), *NO_ATTRIBUTE)


def laid_out(layer: Any, weight: Tensor, shape: torch.Size | None = None) -> Tensor:
    """The weight of a linear layer or convolution as oneDNN computes with it. A convolution's layout depends on the shape
    of its input and on the number of threads: in another than it wants, the weight is laid out anew in every call."""
    if isinstance(layer, nn.Linear):
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry(layer), shape)


def geometry(layer: Any) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups of a convolution."""
    return list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups


def has_bfloat16() -> bool:
    """Whether products and convolutions in bfloat16 are computed as such on this CPU; elsewhere torch's are loops, slower
    than float32 by a factor of ten to more than a hundred."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@cache
def obstacle(dtype: torch.dtype) -> str | None:
    """Why oneDNN is not used here for that dtype; None if it gives what torch gives."""
    if dtype not in DTYPES:
        return f"oneDNN's layers are for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        with torch.no_grad(), torch.inference_mode(False), torch.random.fork_rng([]):
            linear, convolve = nn.Linear(16, 32).to(dtype), nn.Conv2d(16, 32, 3).to(dtype)
            both = linear.bias, linear.bias
            flat, square = torch.ones(2, 16, dtype=dtype), torch.ones(2, 16, 8, 8, dtype=dtype)
            own = convolve.weight.detach()
            pairs = [
                (linear(flat), product(flat, laid_out(linear, linear.weight.detach()), linear.bias)),
                (linear(flat), product(flat, linear.weight, linear.bias)),
                (convolve(square), convolution(square, convolve, laid_out(convolve, own))),
                (convolve(square), convolution(square, convolve, laid_out(convolve, own, square.shape))),
                (own, laid_out(convolve, own).to_dense()),
                (
                    linear(flat) * F.gelu(linear(flat)),
                    gated(flat, *(laid_out(linear, linear.weight.detach()),) * 2, both),
                ),
            ]
            if not all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs):
                return "oneDNN's layers give other numbers than torch's own"
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this torch or this CPU has no such layers of oneDNN: {str(error).splitlines()[0]}"
    return None
