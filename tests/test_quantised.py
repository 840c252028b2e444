"""Weights of 8 bits: a smaller UNet, nearly the same picture, by every engine; and nothing that crashes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import components, needs, pipeline
from test_mixtures import run
from test_step import small

from diffusion_kit import AutoPipelineForText2Image, SDXLPipeline
from diffusion_kit.pipelines import quantised

pytestmark = pytest.mark.heavy
needs("torchao", "heavy")
ERRORS = {"int8": 0.03, "int8_dynamic": 0.06}  # relative in the 2-norm, of random weights


@pytest.fixture
def pipe() -> Any:
    return pipeline(SDXLPipeline, **copy.deepcopy({**components(), "unet": small()[1]}))


@pytest.mark.parametrize("scheme", ERRORS)
def test_nearly_the_same_picture(scheme: str, pipe: Any) -> None:
    plain = run(pipe=pipe)
    for engine in ("eager", "packed"):
        pipe.optimize(engine=engine, quantised=scheme)
        error = float((run(pipe=pipe) - plain).norm() / plain.norm())
        assert 1e-4 < error < ERRORS[scheme]


def test_other_weights_are_seen(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an engine that keeps copies, or that says it cannot."""
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(tmp_path))
    needs("openvino")
    pipe.optimize(engine="openvino", quantised="int8")
    plain = pipeline(SDXLPipeline, **{**pipe.components, "unet": copy.deepcopy(pipe.unet)})
    torch.testing.assert_close(run(pipe=pipe), run(pipe=plain), rtol=1e-3, atol=1e-3)
    for own in (pipe, plain):
        own.unet.conv_out.weight.mul_(0.5)
    torch.testing.assert_close(run(pipe=pipe), run(pipe=plain), rtol=1e-3, atol=1e-3)


def test_a_control_lora_that_is_loaded_stays_as_it_is() -> None:
    pipe = AutoPipelineForText2Image.from_pretrained("default")
    pipe.load_control("regions")
    told = pipe.optimize(engine="eager", quantised="int8")
    assert "int8" in next(line for line in told.splitlines() if "unet by eager" in line)


def test_errors_are_one_line(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantised is 'int3'; it must be int8 or int8_dynamic"):
        pipe.optimize(quantised="int3")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantised needs torchao: pip install 'diffusion_kit\[quantised\]'"):
        pipe.optimize(quantised="int8")
