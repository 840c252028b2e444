"""What `explain` tells: the memory that steps and decoding take, what runs in steps and how often it did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import (
    components,
    light,
    lines,
    make_adapter,
    make_controlnet,
    make_sd_unet,
    make_unet,
    make_vae,
    picture,
    pipeline,
    sd_pipeline,
    seeds,
)
from diffusers import MultiControlNetModel
from test_kandinsky import EMBEDS, HINT, TEXT21, build
from test_mixtures import run
from test_union import union

import diffusion_kit
from diffusion_kit import Control, SD15Pipeline, SDXLPipeline, StableDiffusionXLControlNetPipeline
from diffusion_kit.models.live import Live
from diffusion_kit.models.vae import Decoder
from diffusion_kit.pipelines.expected import tensors_of, working_memory
from diffusion_kit.sampling.engines import Engine
from diffusion_kit.sampling.engines.exported import leaves

GUIDED = {"prompt": "a fox", "guidance_scale": 5.0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sdxl": (lambda: pipeline(SDXLPipeline), GUIDED),
    "sd15": (lambda: sd_pipeline(SD15Pipeline), GUIDED),
    "inpainting": (
        lambda: pipeline(SDXLPipeline, unet=make_unet(9)),
        {**GUIDED, "image": picture(), "mask_image": picture(1), "strength": 1.0},
    ),
    "distilled": (lambda: sd_pipeline(SD15Pipeline, unet=make_sd_unet(time_cond_proj_dim=32)), GUIDED),
    "kandinsky21": (lambda: build(diffusion_kit, "KandinskyPipeline"), {**TEXT21, **EMBEDS}),
    "kandinsky22": (lambda: build(diffusion_kit, "KandinskyV22CombinedPipeline"), {"prompt": "a fox"}),
    "hint": (lambda: build(diffusion_kit, "KandinskyV22ControlnetPipeline"), {**EMBEDS, "hint": HINT}),
    "kandinsky3": (lambda: build(diffusion_kit, "Kandinsky3Pipeline"), {"prompt": "a fox"}),
}


class Measuring(Engine):
    """Counts what steps hold at once beside the weights, with what was made for them before the loop, and what the decoder
    does."""

    step = decoding = 0

    def __call__(self, step: Any, state: torch.Tensor, tensors: Any) -> Any:
        known = [tensor for net in step.executed for tensor in tensors_of(net)]
        made = {own.untyped_storage()._cdata: own.untyped_storage().nbytes() for own in leaves(tensors["denoiser"])}

        def run(*given: Any) -> Any:
            with Live([*known, *given[:2], *leaves(tensors)]) as live:
                out = step(*given)
            self.step = max(self.step, live.peak + sum(made.values()))
            return out

        return run

    def network(self, network: Any) -> Any:
        if not isinstance(network, Decoder):
            return network

        def run(latents: torch.Tensor, beside: Any) -> Any:
            with Live([latents, *tensors_of(network.vae)]) as live:
                out = network(latents, beside)
            self.decoding = live.peak
            return out

        return run


@pytest.mark.parametrize("family", light(FAMILIES, "sdxl", "hint"))
@pytest.mark.filterwarnings("ignore:the size asked for")
def test_it_is_what_a_picture_takes(family: str) -> None:
    make, call = FAMILIES[family]
    pipe = make()
    expected = working_memory(pipe)
    assert expected is not None
    height, width = pipe.native_size
    pipe.engine = engine = Measuring()
    pipe(generator=seeds(1), num_inference_steps=2, height=height, width=width, **call)
    assert expected[0] == pytest.approx(engine.step, rel=0.1)
    assert expected[1] == engine.decoding


def test_how_weights_are_quantised_changes_nothing() -> None:
    pipe = pipeline(SDXLPipeline, unet=make_unet())
    before = working_memory(pipe)
    pipe.unet.register_to_config(quantization_config=object())
    assert working_memory(pipe) == before


def test_it_is_of_the_pipelines_own_size_and_number_type() -> None:
    small, large = (pipeline(SDXLPipeline, unet=make_unet(sample_size=side), vae=make_vae()) for side in (16, 32))
    first, second = working_memory(small), working_memory(large)
    assert second[1] == 4 * first[1]
    assert first[0] < second[0]
    half = pipeline(SDXLPipeline, unet=make_unet(sample_size=32).half(), vae=make_vae())
    assert 2 * working_memory(half)[0] == pytest.approx(second[0], rel=0.05)
    assert working_memory(half)[1] == second[1], "of the autoencoder's own"


def test_explain_tells_what_runs_in_steps_and_how_often_it_did() -> None:
    several = MultiControlNetModel([make_controlnet(), make_controlnet()])
    pipe = pipeline(StableDiffusionXLControlNetPipeline, controlnet=several)
    pipe._base_controls = {"union": union(), "hint": make_unet(), "adapter": make_adapter()}
    told = pipe.explain()
    for line in (
        "controlnet by eager: MultiControlNetModel",
        "union by eager: ControlNetUnionModel",
        "hint by eager: UNet2DConditionModel",
        "adapter as it is, before the first step: T2IAdapter",
    ):
        assert f"runs       {line}" in told
    assert "last call" not in told
    controls = [Control(make_controlnet(), lines(2), end=0.5), Control(make_adapter(), lines(1))]
    plain = pipeline(SDXLPipeline)
    run(controls, pipe=plain, guidance_interval=(0.0, 0.25))
    told = plain.explain()
    assert "last call  4 calls of the network, guidance in 1, ControlNetModel in 2, T2IAdapter in 4" in told


def test_explain_says_which_pictures_the_autoencoder_takes_as_it_is() -> None:
    pipe = pipeline(SDXLPipeline, **copy.deepcopy(components()))
    pipe.optimize(engine="packed")
    assert "vae by packed:" in pipe.explain()
    pipe.optimize(engine="packed", low_memory=True)
    assert "vae by packed, its encoder and large or several pictures as it is:" in pipe.explain()


def test_explain_says_it_and_nothing_of_networks_of_other_kinds() -> None:
    pipe = pipeline(SDXLPipeline)
    step, decoding = (f"{own / 1e6:,.0f} MB" for own in working_memory(pipe))
    height, width = pipe.native_size
    assert f"about {step} in a guided step, {decoding} in decoding of {width} x {height} pixels" in pipe.explain()
    gated = make_sd_unet(class_embed_type="timestep")
    assert "beside them" not in sd_pipeline(SD15Pipeline, unet=gated).explain()
    prior = build(diffusion_kit, "KandinskyV22CombinedPipeline").prior_pipe
    assert "beside them" not in prior.explain()
