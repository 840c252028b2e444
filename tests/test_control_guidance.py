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


@pytest.mark.parametrize("make", [make_adapter, make_controlnet])
def test_the_empty_image_has_the_background_of_the_training(make):
    model, edges = make(), lines(0)
    parts = [alone(model, image, "grey") for image in (torch.ones(1, 3, 64, 64), edges)]
    both = alone(model, edges, "a fox")
    wanted = parts[0] + 2.5 * (parts[1] - parts[0]) + 3.0 * (both - parts[1])
    assert distance(latents([Control(model, edges, guidance=2.5, background=1.0)]), wanted) < 1e-4
    assert distance(latents([Control(model, edges, guidance=2.5)]), wanted) > 1e-2


def test_it_is_refused_where_it_means_nothing():
    model = make_adapter()
    with pytest.raises(
        ValueError, match="this ControlNetModel takes no Control"
    ):  # acts on the conditional branch only
        latents([Control(make_controlnet(global_pool_conditions=True), lines(0), guidance=2.0)])
    for wrong, told in (({"guidance": "2"}, "guidance is '2'"), ({"background": 2.0}, "background is 2.0; it must be")):
        with pytest.raises(ValueError, match=told):
            Control(model, lines(0), **wrong)
    with pytest.raises(ValueError, match="must be 'balanced'"):
        Control(model, lines(0), guidance=2.0, mode="prompt")
    with pytest.raises(ValueError, match="more than one control has a guidance"):
        latents([Control(model, lines(0), guidance=2.0), Control(model, lines(1), guidance=2.0)])
