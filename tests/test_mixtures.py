"""Every kind of control beside every other, in every task: mixtures, reductions, order, batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    distance,
    half_mask,
    light,
    lines,
    make_adapter,
    make_unet,
    make_vae,
    picture,
    pipeline,
    randomise,
    seeds,
    unet,
)
from test_control_lora import lora
from test_ip_adapter import make_ip
from test_step import captured, runs_on_fake_cuda
from test_union import union

from diffusion_kit import Control, SDXLPipeline, StableDiffusionXLControlNetPipeline

SAME = 1e-5
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(), "strength": 0.7},
    "inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 0.8},
}
EIGHTH = {"conditioning_embedding_out_channels": (8, 8, 16, 16)}  # a Control-LoRA scales its image down by 8


def controlnet() -> Any:
    return randomise(diffusers.ControlNetModel.from_unet(unet(), **EIGHTH), 4)


KINDS: dict[str, Callable[..., Control]] = {
    "t2i_adapter": lambda **more: Control(make_adapter(downscale=16), lines(1), **more),
    "controlnet": lambda **more: Control(controlnet(), lines(2), **more),
    "union": lambda **more: Control(union(**EIGHTH), {"canny": lines(3)}, **more),
    "control_lora": lambda **more: Control(lora("StableDiffusionXL"), lines(4), **more),
    "ip_adapter": lambda **more: Control(make_ip(), picture(5), **more),
}


def run(controls: Any = (), task: str = "text", pipe: Any = None, **more: Any) -> torch.Tensor:
    pipe = pipe or pipeline(SDXLPipeline, vae=make_vae(4))
    call = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds(1)}
    return pipe(**{**call, **TASKS[task], **more}, controls=controls, output_type="latent").images


@pytest.mark.parametrize("task", light(TASKS, "inpaint"))
def test_every_pair_is_a_result_of_its_own(task: str) -> None:
    made = {kind: make() for kind, make in KINDS.items()}
    results = {(): run(task=task)} | {(kind,): run([control], task) for kind, control in made.items()}
    for pair in combinations(made, 2):
        results[pair] = run([made[kind] for kind in pair], task)
        assert distance(run([made[kind] for kind in reversed(pair)], task), results[pair]) < SAME, "order matters"
    for first, second in combinations(results, 2):
        assert torch.isfinite(results[first]).all()
        assert distance(results[first], results[second]) > 1e-4, (first, second)


@pytest.mark.parametrize("task", light(TASKS, "inpaint"))
def test_all_at_once_and_each_switched_off(task: str) -> None:
    options = {"scale": 0.7, "mask": half_mask(), "end": 0.75}
    everything = run([make(**options) for make in KINDS.values()], task)
    assert torch.isfinite(everything).all()
    for off in KINDS:
        rest = [make(**options) for kind, make in KINDS.items() if kind != off]
        without = run(rest, task)
        assert distance(everything, without) > 1e-4, off
        assert torch.equal(run([*rest, KINDS[off](**{**options, "scale": 0.0})], task), without)


@pytest.mark.parametrize("task", light(TASKS, "text"))
def test_all_beside_an_instruction(task: str) -> None:
    pipe = pipeline(SDXLPipeline, unet=make_unet(8), vae=make_vae(4))
    for scale in (1.0, 1.5):
        instruct = Control("instruct", picture(8), scale=scale)
        alone = run([instruct], task, pipe)
        for kind, make in KINDS.items():
            if kind != "control_lora":  # its encoder is that of a base with another first convolution
                assert distance(run([instruct, make()], task, pipe), alone) > 1e-3, kind
                assert torch.equal(run([instruct, make(scale=0.0)], task, pipe), alone), kind


def test_a_batch_under_all_is_its_single_runs() -> None:
    prompts = ["a red fox", "two blue boats"]

    def shown(k: int) -> list[Control]:
        images = (lines(k), lines(k + 2), {"canny": lines(k + 4)}, lines(k + 6), picture(k))
        nets = [make().model for make in KINDS.values()]
        return [Control(net, image, scale=0.6) for net, image in zip(nets, images, strict=True)]

    both = [
        Control(
            a.model,
            {"canny": [a.image["canny"], b.image["canny"]]} if isinstance(a.image, dict) else [a.image, b.image],
            scale=0.6,
        )
        for a, b in zip(shown(0), shown(1), strict=True)
    ]
    more: dict[str, Any] = {"num_images_per_prompt": 2, "generator": seeds(1, 2, 3, 4)}
    batch = run(both, "inpaint", prompt=prompts, **more)
    for k in range(4):
        single = run(shown(k // 2), "inpaint", prompt=prompts[k // 2], generator=seeds(k + 1))
        assert distance(single, batch[k : k + 1]) < 1e-4


@pytest.mark.parametrize("cache", light([None, 2], 2))
def test_all_at_once_on_fake_cuda_tensors(cache: int | None) -> None:
    """A host read or a CPU tensor inside a step raises there; a step cache gives what it keeps behind the prediction."""
    pipe = pipeline(SDXLPipeline, vae=make_vae(4))
    pipe.cache_steps(cache)
    made = [make(scale=0.7, mask=half_mask()) for make in KINDS.values()]
    runs_on_fake_cuda(*captured(pipe, prompt="a fox", controls=made, **TASKS["inpaint"]))


def test_beside_a_classes_own_control_sizes_and_mistakes_are_seen_too() -> None:
    pipe = pipeline(StableDiffusionXLControlNetPipeline, controlnet=controlnet(), vae=make_vae(4))
    call = {"num_inference_steps": 1, "output_type": "latent", "height": 72, "width": 72}
    large = KINDS["t2i_adapter"]()
    with pytest.warns(UserWarning, match="sides must be multiples of 16"):
        assert pipe("a fox", image=lines(2), controls=[large], **call).images.shape[-1] in (8, 10)
    with pytest.raises(ValueError, match="controls is one Control; it must be a list of them"):
        pipe("a fox", image=lines(2), controls=large)
    with pytest.raises((TypeError, ValueError), match="str is not a picture"):
        pipe("a fox", image="edges.png")
