"""Schedules: every sampler as matrices, against the schedulers themselves and diffusers' pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import SCHEDULE, distance, light, lines, make_adapter, picture, pipeline, seeds, unet

import diffusion_kit
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.sampling.loop import Run, sample
from diffusion_kit.sampling.schedule import make_schedule

FIRST_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler_v_zero_snr": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim_clip": ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 1.5}),
    "ddim_v_zero_snr": (
        "DDIMScheduler",
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    ),
    "ddim_sample": ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddpm_clip": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 1.5, "variance_type": "fixed_large"}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm_third_order": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_beta": ("UniPCMultistepScheduler", {"solver_order": 3, "use_beta_sigmas": True}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}),
}
SEVERAL_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "heun": ("HeunDiscreteScheduler", {}),
    "heun_clip": ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm_prk": ("PNDMScheduler", {"skip_prk_steps": False}),
}
ALL = {**FIRST_ORDER, **SEVERAL_CALLS}


def make(name: str, **more: Any) -> Any:
    cls, config = ALL[name]
    return getattr(diffusers, cls)(**{**SCHEDULE, **config, **more})


def call(pipe: Any, **more: Any) -> torch.Tensor:
    steps = {"num_inference_steps": 5, "guidance_scale": 3.0, "generator": seeds(1), "output_type": "latent"}
    return pipe(**{"prompt": "a red fox", **steps, **more}).images


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_adapter_with_each_scheduler(name: str) -> None:
    ours, theirs = (
        call(
            pipeline(module.StableDiffusionXLAdapterPipeline, adapter=make_adapter(), scheduler=make(name)),
            image=lines(),
            adapter_conditioning_factor=0.5,
        )
        for module in (diffusion_kit, diffusers)
    )
    assert torch.isfinite(theirs).all()
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", light(SEVERAL_CALLS, "heun", "pndm", "pndm_prk"))
def test_plain_with_each_scheduler_of_several_calls(name: str) -> None:
    ours, theirs = (
        call(pipeline(module.StableDiffusionXLPipeline, scheduler=make(name))) for module in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", light(SEVERAL_CALLS, "heun", "pndm"))
def test_adapter_window_counts_steps_not_calls(name: str) -> None:
    """Against a plain loop over the peer's UNet in which the adapter acts in the first half of the steps."""
    steps, scheduler, adapter = 5, make(name), make_adapter()
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, scheduler=scheduler)
    prompt, negative, pooled, negative_pooled = pipe.encode_prompt("a red fox")
    scheduler.set_timesteps(steps)
    steps_of_calls = make_schedule(make(name), steps).step_of_call
    assert steps_of_calls[-1] == steps - 1
    pixels = torch.from_numpy(np.array(lines())).permute(2, 0, 1)[None] / 255
    features = [feature.repeat(2, 1, 1, 1) for feature in adapter(pixels)]
    latents = torch.randn(1, 4, 16, 16, generator=seeds(1)) * scheduler.init_noise_sigma
    added = {
        "text_embeds": torch.cat([negative_pooled, pooled]),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }
    for step, t in zip(steps_of_calls, scheduler.timesteps, strict=True):
        x = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        residuals = [feature.clone() for feature in features] if step < steps // 2 else None
        noise = unet()(
            x,
            t,
            torch.cat([negative, prompt]),
            added_cond_kwargs=added,
            down_intrablock_additional_residuals=residuals,
        ).sample
        unconditional, conditional = noise.chunk(2)
        latents = scheduler.step(unconditional + 3.0 * (conditional - unconditional), t, latents).prev_sample
    ours = pipeline(diffusion_kit.StableDiffusionXLAdapterPipeline, adapter=adapter, scheduler=make(name))
    half = call(ours, image=lines(), adapter_conditioning_factor=0.5)
    assert distance(half, latents) < 1e-4
    assert distance(call(ours, image=lines()), latents) > 1e-2


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "ddim", "dpm", "unipc", "heun", "lms"])
def test_image_to_image_with_each_scheduler(name: str) -> None:
    ours, theirs = (
        call(
            pipeline(module.StableDiffusionXLImg2ImgPipeline, scheduler=make(name)),
            image=picture(),
            strength=0.6,
        )
        for module in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["euler_ancestral", "ddpm"])
def test_global_random_numbers_are_drawn_as_the_peer_draws_them(name: str) -> None:
    results = []
    for module in (diffusion_kit, diffusers):
        pipe = pipeline(module.StableDiffusionXLPipeline, scheduler=make(name))
        torch.manual_seed(5)
        results.append(call(pipe, generator=None, num_inference_steps=3))
    assert distance(*results) < 1e-4


def test_a_clamp_that_small_numbers_do_not_reach_is_seen() -> None:
    assert make_schedule(diffusers.CMStochasticIterativeScheduler(), 6, denoising_start=0.5).transition is None


def test_a_scheduler_that_cannot_noise_a_picture() -> None:
    scheduler = diffusers.IPNDMScheduler()
    ours, theirs = (
        call(pipeline(m.StableDiffusionXLPipeline, scheduler=scheduler)) for m in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4
    with pytest.raises(ValueError, match="IPNDMScheduler cannot start from a picture"):
        call(pipeline(diffusion_kit.SDXLPipeline, scheduler=scheduler), image=picture())


def test_the_number_of_steps_may_be_numpys() -> None:
    assert make_schedule(make("euler"), np.int64(4)).steps == 4  # type: ignore[arg-type]
    for wrong in (True, 2.0, 0):
        with pytest.raises(ValueError, match="must be a whole number from 1 on"):
            make_schedule(make("euler"), wrong)  # type: ignore[arg-type]


def test_eta() -> None:
    ours, theirs = (
        call(pipeline(module.StableDiffusionXLPipeline, scheduler=make("ddim")), eta=0.8)
        for module in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4
    assert distance(call(pipeline(diffusion_kit.SDXLPipeline, scheduler=make("ddim"))), theirs) > 1e-2


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("clip", [False, True])
def test_learned_variance(kind: str, clip: bool) -> None:
    """The loop over a network with variance channels, against the scheduler's own steps with the same noise."""
    scheduler = diffusers.DDPMScheduler(**SCHEDULE, variance_type=kind, clip_sample=clip)
    schedule = make_schedule(scheduler, 10)
    assert schedule.transition is not None
    weight = torch.randn(8, 4, generator=seeds(3)) / 2

    class Linear:
        executed = ()

        def prepare(self, timesteps: Any, conditioning: Any) -> Any:
            return None

        def __call__(self, tensors: Any, x: Any, answer: Answer) -> Any:
            out = torch.einsum("oc,bchw->bohw", weight, x)
            variance = out[:, 4:].tanh() if kind == "learned_range" else out[:, 4:].square() * 0.01
            return out[:, :4], variance

    start = torch.randn(2, 4, 8, 8, generator=seeds(4))
    ours = sample(Run(schedule, Linear(), {}, generator=seeds(5)), start)
    scheduler.set_timesteps(10)
    generator, x = seeds(5), start
    for t in scheduler.timesteps:
        x = scheduler.step(torch.cat(Linear()(None, x, Answer()), 1), t, x, generator=generator).prev_sample
    assert distance(ours, x) < 1e-5


@pytest.mark.parametrize("cls", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_sampler_that_is_no_matrix_runs_its_own_step(cls: str) -> None:
    """Thresholding by a quantile is not linear."""
    config = {**SCHEDULE, "thresholding": True, **({"clip_sample": False} if cls.startswith("DDIM") else {})}
    scheduler = getattr(diffusers, cls)(**config)
    assert make_schedule(scheduler, 6).transition is None
    ours, theirs = (
        call(pipeline(module.StableDiffusionXLPipeline, scheduler=scheduler)) for module in (diffusion_kit, diffusers)
    )
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_clean_sample_and_noise_level(name: str) -> None:
    """x0 = p x + q m inverts x = a x0 + b e for what the network predicts, in its own parametrisation."""
    schedule = make_schedule(make(name), 7)
    first_calls = [k for k in range(schedule.calls) if k == 0 or name not in SEVERAL_CALLS]
    x0, noise = torch.tensor(0.7), torch.tensor(-1.3)
    for k in first_calls:
        a, b = schedule.noise_level[k]
        p, q = schedule.clean[k]
        s = schedule.input_scale[k]
        kind = ALL[name][1].get("prediction_type", "epsilon")
        predicted = {"epsilon": noise, "sample": x0, "v_prediction": s * a * noise - s * b * x0}[kind]
        assert torch.isclose(p * (a * x0 + b * noise) + q * predicted, x0, atol=2e-3, rtol=2e-3)


def test_a_schedule_leaves_the_scheduler_alone() -> None:
    scheduler = make("dpm")
    before = {key: str(value) for key, value in vars(scheduler).items()}
    make_schedule(scheduler, 9, strength=0.5)
    assert {key: str(value) for key, value in vars(scheduler).items()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "num_inference_steps is 0"),
        ({"steps": 10, "strength": 0.0}, "no step is left"),
        ({"steps": 10, "strength": 1.5}, "strength is 1.5"),
        ({"steps": 10, "timesteps": [3], "sigmas": [1.0]}, "not both"),
        ({"steps": 10, "denoising_end": 0.001, "strength": 0.5}, "no step is left before denoising_end"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(make("euler"), **arguments)
