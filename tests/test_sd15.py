"""Stable Diffusion 1.5: the same picture as diffusers in all three tasks, under every adapter, and what diffusers lacks.

As in test_parity, the call without the feature that a case is about must differ by 100 times the tolerance.
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
    SCHEDULE,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_sd_controlnet,
    make_sd_unet,
    picture,
    randomise,
    sd_components,
    sd_pipeline,
    seeds,
)
from PIL import Image
from safetensors.torch import save_file

import diffusion_kit
from diffusion_kit import AutoPipelineForInpainting, AutoPipelineForText2Image, Control, SD15Pipeline
from diffusion_kit.pipelines.auto import class_name

LATENTS, PIXELS = 1e-4, 1e-3
CALL = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0}
TEXT, IMAGE, INPAINT, ADAPTER = (f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "Adapter"))
CONTROL, CONTROL_IMAGE, CONTROL_INPAINT = (
    f"StableDiffusionControlNet{task}Pipeline" for task in ("", "Img2Img", "Inpaint")
)


def light() -> Any:
    return make_adapter(kind="light_adapter", channels=(32, 64), downscale=4)


def full(seed: int = 3) -> Any:
    return make_adapter(seed, kind="full_adapter", channels=(32, 64, 64), downscale=4)


def run(module: Any, name: str, call: dict[str, Any], parts: dict[str, Any], output: str) -> torch.Tensor:
    pipe = sd_pipeline(getattr(module, name), **{key: make() for key, make in parts.items()})
    generator = call.get("generator", lambda: seeds(1))()
    return pipe(**{**CALL, **call, "generator": generator}, output_type=output).images


# name: (class, feature of the call, call beside the feature, components as functions)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "negative": (TEXT, {"negative_prompt": "a blurry photo of nothing"}, {}, {}),
    "rescale": (TEXT, {"guidance_rescale": 0.7}, {}, {}),
    "batch": (
        TEXT,
        {"prompt": ["a red fox", "two blue boats"]},
        {"prompt": ["a red fox", "a red fox"], "generator": lambda: seeds(1, 2)},
        {},
    ),
    "wide": (TEXT, {"width": 96, "height": 64}, {}, {}),
    "v_prediction": (
        TEXT,
        {"negative_prompt": "night"},
        {},
        {"scheduler": lambda: diffusers.DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", steps_offset=1)},
    ),
    "pndm": (
        TEXT,
        {"negative_prompt": "night"},
        {},
        {"scheduler": lambda: diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)},
    ),
    "old_scheduler": (
        TEXT,
        {"negative_prompt": "night"},
        {},
        {"scheduler": lambda: diffusers.DDIMScheduler(**SCHEDULE, clip_sample=True, steps_offset=0)},
    ),
    "guidance_embedding": (
        TEXT,
        {"guidance_scale": 8.0},
        {"guidance_scale": 3.0},
        {"unet": lambda: make_sd_unet(time_cond_proj_dim=16)},
    ),
    "img2img": (IMAGE, {"strength": 0.4}, {"image": picture()}, {}),
    "img2img_batch": (
        IMAGE,
        {"image": picture(3)},
        {"strength": 0.6, "num_images_per_prompt": 2, "generator": lambda: seeds(1, 2), "image": picture()},
        {},
    ),
    "inpaint": (INPAINT, {"mask_image": half_mask()}, {"image": picture(), "strength": 0.8, "mask_image": lines()}, {}),
    "inpaint_whole": (INPAINT, {"strength": 1.0}, {"image": picture(), "mask_image": half_mask(), "strength": 0.5}, {}),
    "inpaint_nine": (
        INPAINT,
        {"mask_image": half_mask()},
        {"image": picture(), "strength": 0.8, "mask_image": lines()},
        {"unet": lambda: make_sd_unet(9)},
    ),
    "inpaint_nine_whole": (
        INPAINT,
        {"mask_image": half_mask()},
        {"image": picture(), "mask_image": lines()},
        {"unet": lambda: make_sd_unet(9)},
    ),
    "adapter_light": (ADAPTER, {"adapter_conditioning_scale": 0.7}, {"image": lines()}, {"adapter": light}),
    "adapter_full": (ADAPTER, {"adapter_conditioning_scale": 0.7}, {"image": lines()}, {"adapter": full}),
    "multi_adapter": (
        ADAPTER,
        {"adapter_conditioning_scale": [0.2, 0.9]},
        {"image": [lines(1), lines(2)], "adapter_conditioning_scale": [0.5, 0.5]},
        {"adapter": lambda: diffusers.MultiAdapter([full(), full(30)])},
    ),
    "controlnet": (
        CONTROL,
        {"controlnet_conditioning_scale": 0.7},
        {"image": lines()},
        {"controlnet": make_sd_controlnet},
    ),
    "controlnet_window": (
        CONTROL,
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
        {"image": lines(), "num_inference_steps": 8},
        {"controlnet": make_sd_controlnet},
    ),
    "controlnet_prompt_mode": (CONTROL, {"guess_mode": True}, {"image": lines()}, {"controlnet": make_sd_controlnet}),
    "controlnet_pooled": (
        CONTROL,
        {"controlnet_conditioning_scale": 0.3},
        {"image": lines()},
        {"controlnet": lambda: make_sd_controlnet(global_pool_conditions=True)},
    ),
    "several_controlnets": (
        CONTROL,
        {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.5, 1.0]},
        {"image": [lines(1), lines(2)], "controlnet_conditioning_scale": [0.9, 0.6]},
        {"controlnet": lambda: [make_sd_controlnet(4), make_sd_controlnet(40)]},
    ),
    "controlnet_img2img": (
        CONTROL_IMAGE,
        {"controlnet_conditioning_scale": 0.9},
        {"image": picture(), "control_image": lines(), "controlnet_conditioning_scale": 0.2},
        {"controlnet": make_sd_controlnet},
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
        {"controlnet": make_sd_controlnet},
    ),
    "controlnet_inpaint_nine": (
        CONTROL_INPAINT,
        {"controlnet_conditioning_scale": 0.9},
        {
            "image": picture(),
            "mask_image": half_mask(),
            "control_image": lines(),
            "controlnet_conditioning_scale": 0.2,
        },
        {"controlnet": make_sd_controlnet, "unet": lambda: make_sd_unet(9)},
    ),
}


@pytest.mark.filterwarnings("ignore:.*Stable Diffusion needs")
@pytest.mark.parametrize("name", CASES)
def test_latents(name: str) -> None:
    cls, feature, beside, parts = CASES[name]
    ours = run(diffusion_kit, cls, {**beside, **feature}, parts, "latent")
    theirs = run(diffusers, cls, {**beside, **feature}, parts, "latent")
    without = run(diffusion_kit, cls, beside, parts, "latent")
    assert distance(ours, theirs) < LATENTS
    if without.shape == ours.shape:
        assert distance(without, theirs) > 100 * LATENTS, "the feature does nothing"


@pytest.mark.parametrize("name", ["negative", "img2img", "inpaint", "inpaint_nine", "controlnet", "controlnet_inpaint"])
def test_pixels(name: str) -> None:
    cls, feature, beside, parts = CASES[name]
    ours = run(diffusion_kit, cls, {**beside, **feature}, parts, "pt")
    theirs = run(diffusers, cls, {**beside, **feature}, parts, "pt")
    assert ((theirs == 0) | (theirs == 1)).float().mean() < 0.05
    assert (ours - theirs).abs().max() < PIXELS


@pytest.mark.parametrize("name", ["adapter_light", "adapter_full"])
def test_pixels_of_adapters(name: str) -> None:
    """The peer's adapter class gives PIL pictures or arrays."""
    cls, feature, beside, parts = CASES[name]
    ours, theirs = (run(m, cls, {**beside, **feature}, parts, "np") for m in (diffusion_kit, diffusers))
    assert ((theirs == 0) | (theirs == 1)).mean() < 0.05
    assert np.abs(ours - theirs).max() < PIXELS


@pytest.mark.parametrize("name", [INPAINT, CONTROL_INPAINT])
def test_padding_mask_crop(name: str) -> None:
    mask = Image.new("L", (128, 96))
    mask.paste(255, (30, 20, 70, 60))
    call = {"image": picture(size=128).crop((0, 0, 128, 96)), "mask_image": mask, "strength": 0.9}
    parts = {}
    if name == CONTROL_INPAINT:
        parts, call["control_image"] = {"controlnet": make_sd_controlnet}, lines(size=128).crop((0, 0, 128, 96))
    call["padding_mask_crop"] = 8
    ours, theirs = (np.asarray(run(m, name, call, parts, "pil")[0]).astype(int) for m in (diffusion_kit, diffusers))
    assert np.abs(ours - theirs).max() <= 1


def test_clip_skip_is_the_states_of_that_layer_through_the_last_norm() -> None:
    """diffusers 0.42 fails here: it looks for a part of the text encoder that transformers 5 no longer has."""
    parts = sd_components()
    tokens = parts["tokenizer"]("a fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = parts["text_encoder"](tokens, output_hidden_states=True).hidden_states
    for skip in (1, 2):
        expected = parts["text_encoder"].final_layer_norm(hidden[-(skip + 1)])
        states, _ = sd_pipeline(SD15Pipeline).encode_prompt("a fox", clip_skip=skip)
        torch.testing.assert_close(states, expected)


def test_an_autoencoder_made_for_inpainting_sees_picture_and_mask() -> None:
    def asymmetric() -> Any:
        config = {"norm_num_groups": 4, "layers_per_down_block": 1, "layers_per_up_block": 1, "scaling_factor": 0.5}
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        channels = {"down_block_out_channels": (8, 16, 16), "up_block_out_channels": (8, 16, 16)}
        return randomise(diffusers.AsymmetricAutoencoderKL(**config, **blocks, **channels), 2)

    def result(module: Any, image: Image.Image) -> torch.Tensor:
        call = {"image": image, "mask_image": half_mask(), "strength": 1.0}
        return run(module, INPAINT, call, {"vae": asymmetric, "unet": lambda: make_sd_unet(9)}, "pt")

    ours, theirs = result(diffusion_kit, picture()), result(diffusers, picture())
    assert (ours - theirs).abs().max() < PIXELS
    assert (result(diffusion_kit, picture(5)) - theirs).abs().max() > 100 * PIXELS


def test_the_safety_checker_blackens_what_it_flags() -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8}, text_config=vision, projection_dim=16
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    looks = {"feature_extractor": CLIPImageProcessor(size=32, crop_size=32)}

    def both(**weights: float) -> list[Any]:
        for name, value in weights.items():
            getattr(checker, name).data.fill_(value)
        classes = (diffusion_kit.StableDiffusionPipeline, diffusers.StableDiffusionPipeline)
        pipes = [sd_pipeline(cls, safety_checker=checker, **looks) for cls in classes]
        return [pipe(**CALL, generator=seeds(1), output_type="np") for pipe in pipes]

    ours, theirs = both(concept_embeds_weights=-10.0, special_care_embeds_weights=10.0)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected == [True]
    assert not ours.images.any()
    assert not theirs.images.any()
    ours, theirs = both(concept_embeds_weights=10.0)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected == [False]
    assert np.abs(ours.images - theirs.images).max() < PIXELS
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        sd_pipeline(SD15Pipeline, safety_checker=checker)


def test_old_scheduler_settings_are_corrected_with_a_warning() -> None:
    old = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=True, steps_offset=1)
    with pytest.warns(UserWarning, match="clip_sample=True; Stable Diffusion needs clip_sample=False"):
        pipe = sd_pipeline(SD15Pipeline, scheduler=old)
    assert pipe.scheduler.config.clip_sample is False


def test_mixtures_in_every_task_equal_the_sum_and_image_k_belongs_to_prompt_k() -> None:
    """Two kinds of control in one call, in three tasks; picture k of a batch is the picture made alone."""
    controls = [Control(full(), lines(1), scale=0.7, end=0.7), Control(make_sd_controlnet(), lines(2), mode="prompt")]
    tasks: list[dict[str, Any]] = [{}, {"image": picture(), "strength": 0.7}]
    tasks.append({**tasks[1], "mask_image": half_mask()})
    pipe = sd_pipeline(SD15Pipeline)
    call = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 4.0}
    for task in tasks:
        both = pipe(["a fox", "a boat"], generator=seeds(1, 2), controls=controls, **task, **call).images
        for k, prompt in enumerate(("a fox", "a boat")):
            alone = pipe(prompt, generator=seeds(k + 1), controls=controls, **task, **call).images
            assert distance(both[k : k + 1], alone) < 1e-4
            for control in controls:
                fewer = pipe(prompt, generator=seeds(k + 1), controls=[control], **task, **call).images
                assert distance(fewer, alone) > 1e-2


def test_lora_beside_the_peer(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(1)
    net = copy.deepcopy(sd_components()["unet"])
    net.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = get_peft_model_state_dict(net)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    results = []
    for cls in (SD15Pipeline, diffusers.StableDiffusionPipeline):
        pipe = sd_pipeline(cls, unet=copy.deepcopy(sd_components()["unet"]))
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        more = {"cross_attention_kwargs": {"scale": 0.5}, "output_type": "latent"}
        results.append(pipe(**CALL, generator=seeds(1), **more).images)
    assert distance(*results) < LATENTS
    plain = sd_pipeline(SD15Pipeline)(**CALL, generator=seeds(1), output_type="latent").images
    assert distance(plain, results[1]) > 1e-2


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (CONTROL_IMAGE, {}, "needs image="),
        (CONTROL_INPAINT, {"image": picture()}, "needs mask_image="),
        (CONTROL_INPAINT, {"mask_image": half_mask()}, "needs image="),
    ],
)
def test_what_a_peers_class_needs(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(diffusion_kit, name, {"control_image": lines(), **given}, {"controlnet": make_sd_controlnet}, "latent")


@pytest.mark.parametrize("name", [CONTROL, ADAPTER])
def test_arrays_have_their_height_first(name: str) -> None:
    array = np.asarray(picture(size=96).crop((0, 0, 64, 96)))
    parts = {"controlnet": make_sd_controlnet} if name == CONTROL else {"adapter": full}
    assert run(diffusion_kit, name, {"image": [array]}, parts, "pt").shape[-2:] == (96, 64)


def test_an_adapter_class_rounds_to_what_its_adapter_divides() -> None:
    parts = {"adapter": lambda: make_adapter(kind="full_adapter", channels=(32, 64, 64), downscale=8)}
    pipe = sd_pipeline(diffusion_kit.StableDiffusionAdapterPipeline, adapter=parts["adapter"]())
    with pytest.warns(UserWarning, match="multiples of 8"), pytest.raises(ValueError, match="does not fit the base"):
        pipe("a fox", image=lines(), width=60, height=64)


def test_a_folder_of_sdxl_is_told() -> None:
    with pytest.raises(ValueError, match="this UNet is SDXL's, which StableDiffusionPipeline is not made for"):
        diffusion_kit.StableDiffusionPipeline.from_pretrained("default")


def test_long_embeddings_have_a_negative_of_their_length() -> None:
    pipe = sd_pipeline(SD15Pipeline)
    states, _ = pipe.encode_prompt("a fox jumps over " * 12, prompt_syntax="weighted")
    assert states.shape[1] > 77
    _, negative = pipe.encode_prompt(None, prompt_embeds=states)
    assert negative.shape == states.shape


def test_float16_decodes_in_float16() -> None:
    """Configurations leave force_upcast at True; with it the decoder would run in float32, at twice the memory."""
    pipe = sd_pipeline(SD15Pipeline, vae=copy.deepcopy(sd_components()["vae"]).half())
    pipe.vae.register_to_config(force_upcast=True)
    seen: list[torch.dtype] = []
    pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    pipe.decode(torch.randn(1, 4, 16, 16), "pt")
    assert seen == [torch.float16]


def test_folders_both_ways_and_factories(tmp_path: Path) -> None:
    sd_pipeline(SD15Pipeline).save_pretrained(tmp_path / "ours")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", use_safetensors=True)
    assert type(theirs) is diffusers.StableDiffusionPipeline
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = AutoPipelineForText2Image.from_pretrained(tmp_path / "theirs")
    assert type(loaded) is SD15Pipeline
    results = []
    for pipe in (loaded, theirs):
        pipe.set_progress_bar_config(disable=True)
        results.append(pipe(**CALL, generator=seeds(1), output_type="latent").images)
    assert distance(*results) < LATENTS
    adapter = AutoPipelineForText2Image.from_pretrained(tmp_path / "theirs", adapter=full())
    assert type(adapter) is diffusion_kit.StableDiffusionAdapterPipeline
    adapter.save_pretrained(tmp_path / "adapter")
    read = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "adapter", use_safetensors=True)
    assert type(read) is diffusers.StableDiffusionAdapterPipeline
    control = AutoPipelineForInpainting.from_pipe(theirs, controlnet=make_sd_controlnet())
    assert type(control) is diffusion_kit.StableDiffusionControlNetInpaintPipeline


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((4, 768), "StableDiffusionPipeline"),
        ((9, 768), "StableDiffusionPipeline"),
        ((9, 1024), "StableDiffusionPipeline"),
        ((4, 2048), "StableDiffusionXLPipeline"),
        ((4, 1280), "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_a_single_file_is_known_by_its_header(widths: tuple[int, int], expected: str, tmp_path: Path) -> None:
    inputs, text = widths
    shapes = {"0.0.weight": (4, inputs, 1, 1), "1.1.transformer_blocks.0.attn2.to_k.weight": (4, text)}
    tensors = {f"model.diffusion_model.input_blocks.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    tensors["first_stage_model.x"] = torch.zeros(1)
    save_file(tensors, tmp_path / "a.safetensors")
    assert class_name(tmp_path / "a.safetensors") == expected


def test_a_single_file_of_no_known_kind_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="tensors of no kind that is known, .*; the families of this version are Kandinsky21"
    ):
        AutoPipelineForText2Image.from_pretrained(tmp_path / "a.safetensors")
