"""A control's own guidance: away from what a black control image gives, beside the prompt's guidance."""

from __future__ import annotations

import conftest
import pytest
import torch
from conftest import distance, lines, make_adapter, make_controlnet

from diffusion_kit import Control, SDXLPipeline

CALL = {"num_inference_steps": 1, "output_type": "latent", "height": 64, "width": 64, "negative_prompt": "grey"}


def start(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def latents(controls: list, noise: torch.Tensor | None = None) -> torch.Tensor:
    noise = start() if noise is None else noise
    own = {**CALL, "negative_prompt": ["grey"] * len(noise)}
    pipe = conftest.pipeline(SDXLPipeline)
    return pipe(["a fox"] * len(noise), controls=controls, latents=noise, guidance_scale=3.0, **own).images


def alone(model, image, prompt: str) -> torch.Tensor:
    """One step of the Euler sampler without guidance is affine in the prediction, so branches combine as it does."""
    pipe = conftest.pipeline(SDXLPipeline)
    own = {**CALL, "negative_prompt": None}
    return pipe(prompt, controls=[Control(model, image)], latents=start(), guidance_scale=1.0, **own).images


@pytest.mark.parametrize("make", [make_adapter, make_controlnet])
def test_it_is_the_sum_of_three_branches(make):
    """none + g (control - none) + w (prompt and control - control), each a run of its own."""
    model, edges = make(), lines(0)
    black = torch.zeros(1, 3, 64, 64)
    none, control, both = alone(model, black, "grey"), alone(model, edges, "grey"), alone(model, edges, "a fox")
    wanted = none + 2.5 * (control - none) + 3.0 * (both - control)
    made = latents([Control(model, edges, guidance=2.5)])
    assert distance(made, wanted) < 1e-4
    assert distance(latents([Control(model, edges)]), wanted) > 1e-2


@pytest.mark.parametrize("make", [make_adapter, make_controlnet])
def test_a_batch_is_its_single_runs(make):
    model, pair, noise = make(), [lines(0), lines(1)], start(2)
    made = latents([Control(model, pair, guidance=2.0)], noise)
    for k, edges in enumerate(pair):
        assert distance(made[k : k + 1], latents([Control(model, edges, guidance=2.0)], noise[k : k + 1])) < 1e-4


def test_it_is_refused_where_it_means_nothing():
    model = make_adapter()
    with pytest.raises(ValueError, match="must be 'balanced'"):
        Control(model, lines(0), guidance=2.0, mode="prompt")
    with pytest.raises(ValueError, match="more than one control has a guidance"):
        latents([Control(model, lines(0), guidance=2.0), Control(model, lines(1), guidance=2.0)])
