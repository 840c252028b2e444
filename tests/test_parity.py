"""The same picture as diffusers: latents to 1e-4 of their range and pixels to 1e-3, on random weights.

Each case names the feature it is about; the same call without it must differ by 100 times the tolerance, so that no
case passes because the feature does nothing.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    components,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_controlnet,
    make_unet,
    make_vae,
    needs,
    picture,
    pipeline,
    seeds,
    unet,
)
from PIL import Image

import diffusion_kit

LATENTS, PIXELS = 1e-4, 1e-3
CALL = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0}
TEXT, IMAGE, INPAINT = (f"StableDiffusionXL{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
ADAPTER = "StableDiffusionXLAdapterPipeline"
CONTROL, CONTROL_IMAGE, CONTROL_INPAINT = (
    f"StableDiffusionXLControlNet{task}Pipeline" for task in ("", "Img2Img", "Inpaint")
)


def run(
    module: Any, name: str, call: dict[str, Any], parts: dict[str, Any], output: str, engine: str | None = None
) -> torch.Tensor:
    pipe = pipeline(getattr(module, name), **{key: make() for key, make in parts.items()})
    if engine is not None:
        pipe.optimize(engine=engine)
        assert pipe.engine.name == engine, pipe.notes
    generator = call.get("generator", lambda: seeds(1))()
    images = pipe(**{**CALL, **call, "generator": generator}, output_type=output).images
    assert engine is None or not pipe.engine.notes, "else it is another engine's picture"
    return images


def multi_adapter() -> Any:
    return diffusers.MultiAdapter([make_adapter(3), make_adapter(30)])


def two_controlnets() -> Any:
    return [make_controlnet(4), make_controlnet(40)]


def shallow_unet() -> Any:
    """Attention in the first levels, as in Stable Diffusion 1.5: light and full adapters are made for it."""
    return make_unet(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def refiner_unet() -> Any:
    return make_unet(ids=5)


# name: (class, feature of the call, call beside the feature, components as functions)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "negative": (TEXT, {"negative_prompt": "a blurry photo of nothing"}, {}, {}),
    "second_prompt": (TEXT, {"prompt_2": "something else entirely"}, {}, {}),
    "rescale": (TEXT, {"guidance_rescale": 0.7}, {}, {}),
    "clip_skip": (TEXT, {"clip_skip": 2}, {}, {}),
    "batch": (
        TEXT,
        {"prompt": ["a red fox", "two blue boats"]},
        {"prompt": ["a red fox", "a red fox"], "generator": lambda: seeds(1, 2)},
        {},
    ),
    "sizes": (
        TEXT,
        {"original_size": (300, 20), "crops_coords_top_left": (40, 8), "target_size": (90, 70)},
        {},
        {},
    ),
    "negative_sizes": (TEXT, {"negative_original_size": (9, 400), "negative_target_size": (300, 5)}, {}, {}),
    "denoising_end": (TEXT, {"denoising_end": 0.6}, {}, {}),
    "timesteps": (TEXT, {"timesteps": [900, 500, 300, 100]}, {}, {}),
    "sigmas": (TEXT, {"sigmas": [12.0, 5.0, 2.0, 0.5]}, {}, {}),
    "wide": (TEXT, {"width": 96}, {}, {}),
    "odd_size": (TEXT, {"width": 72, "height": 104}, {}, {}),
    "img2img": (IMAGE, {"strength": 0.7}, {"image": picture()}, {}),
    "img2img_batch": (
        IMAGE,
        {"image": picture(3)},
        {"strength": 0.6, "num_images_per_prompt": 2, "generator": lambda: seeds(1, 2), "image": picture()},
        {},
    ),
    "refiner": (
        IMAGE,
        {"aesthetic_score": 100.0},
        {"image": picture(), "strength": 0.9},
        {"unet": refiner_unet, "requires_aesthetics_score": lambda: True},
    ),
    "hand_over": (IMAGE, {"denoising_start": 0.5}, {"image": torch.randn(1, 4, 16, 16) * 3}, {}),
    "inpaint": (INPAINT, {"mask_image": half_mask()}, {"image": picture(), "strength": 0.8, "mask_image": lines()}, {}),
    "inpaint_whole": (INPAINT, {"strength": 1.0}, {"image": picture(), "mask_image": half_mask(), "strength": 0.5}, {}),
    "inpaint_nine": (
        INPAINT,
        {"mask_image": half_mask()},
        {"image": picture(), "strength": 0.8, "mask_image": lines()},
        {"unet": lambda: make_unet(9)},
    ),
    "adapter": (ADAPTER, {"adapter_conditioning_scale": 0.8}, {"image": lines()}, {"adapter": make_adapter}),
    "adapter_factor": (
        ADAPTER,
        {"adapter_conditioning_factor": 0.5},
        {"image": lines(), "num_inference_steps": 8, "adapter_conditioning_scale": 2.0},
        {"adapter": make_adapter},
    ),
    "adapter_factor_58": (
        ADAPTER,
        {"adapter_conditioning_factor": 0.58},
        {"image": lines(), "num_inference_steps": 50, "adapter_conditioning_scale": 2.0},
        {"adapter": make_adapter},
    ),
    "adapter_three_levels": (
        ADAPTER,
        {"adapter_conditioning_scale": 0.6},
        {"image": lines(size=128)},
        {"adapter": lambda: make_adapter(channels=(32, 64, 64), downscale=16), "vae": lambda: make_vae(levels=4)},
    ),
    "adapter_light": (
        ADAPTER,
        {"adapter_conditioning_scale": 0.7},
        {"image": lines()},
        {
            "adapter": lambda: make_adapter(kind="light_adapter", channels=(32, 64), downscale=4),
            "unet": shallow_unet,
        },
    ),
    "adapter_full": (
        ADAPTER,
        {"adapter_conditioning_scale": 0.7},
        {"image": lines()},
        {
            "adapter": lambda: make_adapter(kind="full_adapter", channels=(32, 64, 64), downscale=4),
            "unet": shallow_unet,
        },
    ),
    "multi_adapter": (
        ADAPTER,
        {"adapter_conditioning_scale": [0.2, 0.9]},
        {"image": [lines(1), lines(2)], "adapter_conditioning_scale": [0.5, 0.5]},
        {"adapter": multi_adapter},
    ),
    "controlnet": (
        CONTROL,
        {"controlnet_conditioning_scale": 0.7},
        {"image": lines()},
        {"controlnet": make_controlnet},
    ),
    "controlnet_window": (
        CONTROL,
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
        {"image": lines(), "num_inference_steps": 8},
        {"controlnet": make_controlnet},
    ),
    "controlnet_prompt_mode": (CONTROL, {"guess_mode": True}, {"image": lines()}, {"controlnet": make_controlnet}),
    "controlnet_prompt_mode_alone": (
        CONTROL,
        {"guess_mode": True},
        {"image": lines(), "guidance_scale": 1.0},
        {"controlnet": make_controlnet},
    ),
    "controlnet_bgr": (
        CONTROL,
        {"image": picture(2)},
        {"image": picture(3)},
        {"controlnet": lambda: make_controlnet(controlnet_conditioning_channel_order="bgr")},
    ),
    "controlnet_pooled": (
        CONTROL,
        {"controlnet_conditioning_scale": 0.3},
        {"image": lines()},
        {"controlnet": lambda: make_controlnet(global_pool_conditions=True)},
    ),
    "several_controlnets": (
        CONTROL,
        {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.5, 1.0]},
        {"image": [lines(1), lines(2)], "controlnet_conditioning_scale": [0.9, 0.6]},
        {"controlnet": two_controlnets},
    ),
    "controlnet_denoising_end": (
        CONTROL,
        {"control_guidance_end": 0.4},
        {"image": lines(), "denoising_end": 0.7, "num_inference_steps": 8},
        {"controlnet": make_controlnet},
    ),
    "controlnet_img2img": (
        CONTROL_IMAGE,
        {"controlnet_conditioning_scale": 0.9},
        {"image": picture(), "control_image": lines(), "controlnet_conditioning_scale": 0.2},
        {"controlnet": make_controlnet},
    ),
    "controlnet_inpaint": (
        CONTROL_INPAINT,
        {"controlnet_conditioning_scale": 0.9},
        {
            "image": picture(),
            "mask_image": half_mask(),
            "control_image": lines(),
            "controlnet_conditioning_scale": 0.2,
            "strength": 0.9,
        },
        {"controlnet": make_controlnet},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_latents(name: str) -> None:
    cls, feature, beside, parts = CASES[name]
    ours = run(diffusion_kit, cls, {**beside, **feature}, parts, "latent")
    theirs = run(diffusers, cls, {**beside, **feature}, parts, "latent")
    without = run(diffusion_kit, cls, beside, parts, "latent")
    assert distance(ours, theirs) < LATENTS
    if without.shape == ours.shape:
        assert distance(without, theirs) > 100 * LATENTS, "the feature does nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of converted networks: many cases have the same."""
    return tmp_path_factory.mktemp("engines")


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["packed", "openvino"])
@pytest.mark.parametrize("name", CASES)
def test_latents_by_other_engines(name: str, engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "openvino":
        needs("openvino")
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(folder))
    cls, feature, beside, parts = CASES[name]
    theirs = run(diffusers, cls, {**beside, **feature}, parts, "latent")
    own = {"unet": lambda: copy.deepcopy(components()["unet"]), **parts}
    assert distance(run(diffusion_kit, cls, {**beside, **feature}, own, "latent", engine), theirs) < LATENTS


@pytest.mark.parametrize("name", ["negative", "img2img", "inpaint", "adapter", "controlnet"])
def test_pixels(name: str) -> None:
    cls, feature, beside, parts = CASES[name]
    ours = run(diffusion_kit, cls, {**beside, **feature}, parts, "pt")
    theirs = run(diffusers, cls, {**beside, **feature}, parts, "pt")
    clamped = ((theirs == 0) | (theirs == 1)).float().mean()
    assert clamped < 0.05
    assert (ours - theirs).abs().max() < PIXELS


@pytest.mark.parametrize("name", [INPAINT, CONTROL_INPAINT])
def test_padding_mask_crop(name: str) -> None:
    """Only the masked region is worked on, and pasted back: compared as 8-bit pictures."""
    mask = Image.new("L", (128, 96))
    mask.paste(255, (30, 20, 70, 60))
    call = {"image": picture(size=128).crop((0, 0, 128, 96)), "mask_image": mask, "strength": 0.9}
    parts = {}
    if name == CONTROL_INPAINT:
        parts, call["control_image"] = {"controlnet": make_controlnet}, lines(size=128).crop((0, 0, 128, 96))
    call["padding_mask_crop"] = 8
    ours, theirs = (np.asarray(run(m, name, call, parts, "pil")[0]).astype(int) for m in (diffusion_kit, diffusers))
    assert np.abs(ours - theirs).max() <= 1
    outside = np.asarray(mask) == 0
    assert np.array_equal(ours[outside], np.asarray(call["image"])[outside])
    assert np.abs(ours - np.asarray(call["image"]))[~outside].mean() > 5


def test_padding_mask_crop_with_controls_of_the_call() -> None:
    """Pictures and masks of `controls` follow the crop: as in the ControlNet class, which agrees with the peer."""
    mask = Image.new("L", (128, 96))
    mask.paste(255, (30, 20, 70, 60))
    image, edges = (make(size=128).crop((0, 0, 128, 96)) for make in (picture, lines))
    call = {"image": image, "mask_image": mask, "strength": 0.9, "padding_mask_crop": 8, "height": 96, "width": 128}
    named = run(
        diffusion_kit, CONTROL_INPAINT, {**call, "control_image": edges}, {"controlnet": make_controlnet}, "pil"
    )
    for control_mask in (None, Image.new("L", (128, 96), 255)):
        own = diffusion_kit.Control(make_controlnet(), edges, mask=control_mask)
        family = run(diffusion_kit, "SDXLPipeline", {**call, "controls": [own]}, {}, "pil")
        assert np.array_equal(np.asarray(family[0]), np.asarray(named[0]))
    twice = mask.resize((256, 192), Image.Resampling.NEAREST)
    larger = run(diffusion_kit, "SDXLPipeline", {**call, "controls": [own], "mask_image": twice}, {}, "pil")
    assert np.array_equal(np.asarray(larger[0]), np.asarray(family[0])), "a mask may have another size"
    for wrong in ({"image": torch.rand(1, 3, 96, 128)}, {"output_type": "pt"}):
        with pytest.raises(ValueError, match="padding_mask_crop"):
            pipeline(diffusion_kit.SDXLPipeline)("a fox", **{**call, **wrong})


def test_guidance_turned_off_by_a_callback() -> None:
    """The peer's recipe for dynamic guidance: halves the embeddings and sets `_guidance_scale` on the way."""

    def turn_off(pipe: Any, k: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if k == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = 0.0
            return {name: value if name == "latents" else value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    feature = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": names}
    ours, theirs = (run(module, TEXT, feature, {}, "latent") for module in (diffusion_kit, diffusers))
    assert distance(ours, theirs) < LATENTS
    assert distance(run(diffusion_kit, TEXT, {}, {}, "latent"), theirs) > 100 * LATENTS


def test_prompt_replaced_by_a_callback() -> None:
    """What was cached from a replaced tensor is made again."""
    pipe = pipeline(diffusers.StableDiffusionXLPipeline)
    other = torch.cat(pipe.encode_prompt("something new", do_classifier_free_guidance=True)[1::-1])

    def replace(pipe: Any, k: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": other} if k == 1 else {}

    feature = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    ours, theirs = (run(module, TEXT, feature, {}, "latent") for module in (diffusion_kit, diffusers))
    assert distance(ours, theirs) < LATENTS
    assert distance(run(diffusion_kit, TEXT, {}, {}, "latent"), theirs) > 100 * LATENTS


def test_guidance_embedding() -> None:
    """UNets distilled with `time_cond_proj_dim` take the scale as an embedding and no second half."""
    parts = {"unet": lambda: make_unet(time_cond_proj_dim=16)}
    ours, theirs = (run(m, TEXT, {"guidance_scale": 8.0}, parts, "latent") for m in (diffusion_kit, diffusers))
    assert distance(ours, theirs) < LATENTS
    assert distance(run(diffusion_kit, TEXT, {"guidance_scale": 3.0}, parts, "latent"), theirs) > 100 * LATENTS


def test_ready_embeddings_and_free_u() -> None:
    results = []
    for module in (diffusion_kit, diffusers):
        pipe = pipeline(module.StableDiffusionXLPipeline)
        prompt, negative, pooled, negative_pooled = pipe.encode_prompt("a boat", negative_prompt="bad")
        pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
        results.append(
            pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=negative_pooled,
                num_inference_steps=4,
                generator=seeds(1),
                output_type="latent",
            ).images
        )
        pipe.disable_freeu()
    assert distance(*results) < LATENTS


@pytest.mark.parametrize("net", ["unet", "controlnet"])
def test_executor_beside_the_networks_own_forward(net: str) -> None:
    """A new release of diffusers that changes a forward is a red test here, not a wrong picture."""
    from diffusion_kit.adapters.controlnet import RunControlNet, embed
    from diffusion_kit.models.attention import installed
    from diffusion_kit.models.denoiser import PeerDenoiser, UNetDenoiser, prepare_embeddings
    from diffusion_kit.sampling.doors import Answer, at

    x, image = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 64, 64)
    conditioning = {
        "prompt_embeds": torch.randn(2, 7, 48),
        "add_text_embeds": torch.randn(2, 32),
        "add_time_ids": torch.rand(2, 6) * 64,
    }
    times, call = torch.tensor([900.0, 333.0]), torch.tensor([1])
    own = make_controlnet() if net == "controlnet" else unet()
    prepared = prepare_embeddings(own, times, conditioning)
    if net == "controlnet":
        weights = [torch.rand(1, 1, 1, 1) for _ in range(10)]
        tensors = {**prepared, "hint": embed(own, image), "weights": weights}
        peer = {**conditioning, "timesteps": times, "image": image, "weights": weights}
        with installed(own):
            fast = RunControlNet(own, False, False)(at(tensors, call), x, 1)
        slow = RunControlNet(own, False, True)(at(peer, call), x, 1)
        pairs = list(zip((*fast.skips, fast.mid), (*slow.skips, slow.mid), strict=True))
    else:
        adapter, controlnet = make_adapter(), make_controlnet()
        residuals = Answer(intra=tuple(adapter(image)))
        extra = controlnet(x, times[1], conditioning["prompt_embeds"], image, added_cond_kwargs=_added(conditioning))
        both = Answer(residuals.intra, tuple(extra.down_block_res_samples), extra.mid_block_res_sample)
        pairs = []
        for given in (Answer(), residuals, both):
            with installed(own):
                fast = UNetDenoiser(own, 4)(at(prepared, call), x, given)[0]
            slow = PeerDenoiser(own, 4)(at({**conditioning, "timesteps": times}, call), x, given)[0]
            pairs.append((fast, slow))
        assert distance(pairs[0][0], pairs[1][0]) > 1e-2
        assert distance(pairs[1][0], pairs[2][0]) > 1e-2
    for fast, slow in pairs:
        assert distance(fast, slow) < 1e-5


def _added(conditioning: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"text_embeds": conditioning["add_text_embeds"], "time_ids": conditioning["add_time_ids"]}
