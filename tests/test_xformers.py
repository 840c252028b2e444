"""xformers' attention where diffusers has set it on a network: in the executor, beside every control.

xformers computes on CUDA only; here torch computes in its place, in its layout.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import components, distance, lines, make_controlnet, pipeline
from diffusers.models.attention_processor import XFormersAttnProcessor
from test_mixtures import run

from diffusion_kit import Control, SDXLPipeline


def test_the_executor_takes_xformers_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the UNet alone, not of the ControlNet beside it."""
    asked: list[tuple[Any, Any]] = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, op: Any = None) -> torch.Tensor:
        asked.append((query.shape, op))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", attention, raising=False)
    pipe = pipeline(SDXLPipeline, **copy.deepcopy(components()))
    controls = [Control(make_controlnet(), lines(1))]
    plain = run(controls, pipe=pipe)
    processor = XFormersAttnProcessor(attention_op="an operation")
    pipe.unet.set_attn_processor(processor)
    assert "own forward" not in pipe.explain()
    assert distance(run(controls, pipe=pipe), plain) < 1e-6
    layers = [layer for layer in pipe.unet.attn_processors.values()]
    assert all(layer is processor for layer in layers), "it is there again afterwards"
    assert len(asked) % len(layers) == 0 < len(asked)
    assert {op for _, op in asked} == {"an operation"}
    assert {len(shape) for shape, _ in asked} == {4}
