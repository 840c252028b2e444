"""Kandinsky 2.1, 2.2 and 3: the same picture as diffusers where it is right, and what diffusers lacks.

As in test_parity, the call without the feature that a case is about must differ by 10 times the tolerance.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import crossed, distance, half_mask, light, lines, make_adapter, picture, seeds
from kandinsky_models import (
    CHANNELS,
    DECODER_SCHEDULE,
    WIDTH,
    decoder21_components,
    decoder22_components,
    kandinsky3_components,
    prior_components,
    unet21,
    unet22,
    unet22_hint,
)

import diffusion_kit
from diffusion_kit import Control
from diffusion_kit.pipelines.starts import grown
from diffusion_kit.sampling.engines import Compiled

PIXELS = 1e-3
LEARNED = diffusers.DDPMScheduler(**DECODER_SCHEDULE, variance_type="learned_range")
FIXED = diffusers.DDPMScheduler(**DECODER_SCHEDULE, variance_type="fixed_small")
DDIM = diffusers.DDIMScheduler(**DECODER_SCHEDULE, set_alpha_to_one=False, steps_offset=1)
CALL = {"num_inference_steps": 4, "height": 64, "width": 64}
PRIOR = {f"prior_{name}": part for name, part in prior_components().items()}


def embeds(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


EMBEDS = {"image_embeds": embeds(0), "negative_image_embeds": embeds(1)}
TEXT21 = {"prompt": "a red fox", "negative_prompt": "a blurry thing"}
HINT = torch.from_numpy(np.asarray(lines(4)).copy()).permute(2, 0, 1)[None].float() / 255


def components(name: str) -> dict[str, Any]:
    if name.startswith("Kandinsky3"):
        return dict(kandinsky3_components())
    new = "V22" in name or "22" in name
    parts = dict(decoder22_components() if new else decoder21_components())
    if "Controlnet" in name:
        parts["unet"] = unet22_hint()
    elif "Inpaint" in name:
        parts["unet"] = unet22(9) if new else unet21(9)
    return {**parts, **PRIOR} if "Combined" in name else parts


def build(module: Any, name: str, **replaced: Any) -> Any:
    pipe = getattr(module, name)(**{**components(name), **replaced})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, seed: int = 3, **call: Any) -> torch.Tensor:
    images = pipe(**{"generator": seeds(seed), "output_type": "np", **call}).images
    return torch.as_tensor(images)


IMAGE = {"image": picture(1)}
MASK = {**IMAGE, "mask_image": half_mask()}
# name: (class, feature of the call, call beside it, components)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {}
for scheduler in (DDIM, LEARNED, FIXED):
    kind = {"scheduler": scheduler}
    label = f"{type(scheduler).__name__[:4]}_{scheduler.config.get('variance_type', '')}"
    CASES |= {
        f"21_text_{label}": ("KandinskyPipeline", {"prompt": "a cat"}, {**CALL, **TEXT21, **EMBEDS}, kind),
        f"21_image_{label}": ("KandinskyImg2ImgPipeline", IMAGE, {**CALL, **TEXT21, **EMBEDS, "strength": 0.5}, kind),
        f"21_inpaint_{label}": ("KandinskyInpaintPipeline", MASK, {**CALL, **TEXT21, **EMBEDS}, kind),
        f"22_text_{label}": ("KandinskyV22Pipeline", EMBEDS, CALL, kind),
        f"22_image_{label}": ("KandinskyV22Img2ImgPipeline", IMAGE, {**CALL, **EMBEDS, "strength": 0.5}, kind),
        f"22_inpaint_{label}": ("KandinskyV22InpaintPipeline", MASK, {**CALL, **EMBEDS}, kind),
    }
COMBINED = {**TEXT21, **CALL, "prior_num_inference_steps": 3, "prior_guidance_scale": 2.0}
CASES |= {
    "21_embeds": ("KandinskyPipeline", EMBEDS, {**CALL, **TEXT21}, {}),
    "22_odd_size": ("KandinskyV22Pipeline", {"width": 100}, {**CALL, **EMBEDS}, {}),
    "22_many": ("KandinskyV22Pipeline", {"num_images_per_prompt": 2}, {**CALL, **EMBEDS}, {}),
    "hint_text": ("KandinskyV22ControlnetPipeline", {"hint": HINT}, {**CALL, **EMBEDS}, {}),
    "hint_image": (
        "KandinskyV22ControlnetImg2ImgPipeline",
        {"hint": HINT},
        {**CALL, **EMBEDS, **IMAGE, "strength": 0.6},
        {},
    ),
    "21_combined": ("KandinskyCombinedPipeline", {"prompt": "a cat"}, COMBINED, {}),
    "21_combined_image": ("KandinskyImg2ImgCombinedPipeline", IMAGE, {**COMBINED, "strength": 0.5}, {}),
    "21_combined_inpaint": ("KandinskyInpaintCombinedPipeline", MASK, COMBINED, {}),
    "22_combined": ("KandinskyV22CombinedPipeline", {"negative_prompt": "x"}, COMBINED, {}),
    "22_combined_prior": ("KandinskyV22CombinedPipeline", {"prior_guidance_scale": 8.0}, COMBINED, {}),
    "22_combined_image": ("KandinskyV22Img2ImgCombinedPipeline", IMAGE, {**COMBINED, "strength": 0.5}, {}),
    "22_combined_inpaint": ("KandinskyV22InpaintCombinedPipeline", MASK, COMBINED, {}),
    "3_text": ("Kandinsky3Pipeline", {"prompt": "a cat"}, CALL, {}),
    "3_negative": (
        "Kandinsky3Pipeline",
        {"negative_prompt": "a long and blurry thing"},
        {**CALL, "prompt": "a fox"},
        {},
    ),
    "3_unguided": ("Kandinsky3Pipeline", {"guidance_scale": 1.0}, {**CALL, "prompt": "a fox"}, {}),
    "3_image": (
        "Kandinsky3Img2ImgPipeline",
        IMAGE,
        {"prompt": "a fox", "num_inference_steps": 4, "strength": 0.5},
        {},
    ),
}
OTHER = {"image": picture(7), "mask_image": lines(), "hint": HINT.flip(-1), "prompt": "two blue boats, far away"}
OTHER |= {"image_embeds": embeds(8), "negative_image_embeds": embeds(9)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:the size asked for")
def test_same_picture_as_the_peer(case: str) -> None:
    name, feature, call, parts = CASES[case]
    ours, theirs = build(diffusion_kit, name, **parts), build(diffusers, name, **parts)
    result = run(ours, **{**call, **feature})
    assert distance(result, run(theirs, **{**call, **feature})) < PIXELS
    without = {**call, **{key: OTHER[key] for key in feature if key in OTHER}}
    assert result.shape != (other := run(ours, **without)).shape or distance(other, result) > 10 * PIXELS


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES.values()}))
def test_peer_named_classes_have_its_components_and_arguments(name: str) -> None:
    import inspect

    ours, theirs = getattr(diffusion_kit, name), getattr(diffusers, name)
    assert list(inspect.signature(ours.__init__).parameters) == list(inspect.signature(theirs.__init__).parameters)
    own, peers = inspect.signature(ours.__call__).parameters, inspect.signature(theirs.__call__).parameters
    expected = [argument for argument in peers if argument != "kwargs"]
    assert list(own)[: len(expected)] == expected
    for argument in expected:
        sized = name == "Kandinsky3Pipeline" and argument in (
            "height",
            "width",
        )  # by default those of the picture, or 1024
        if peers[argument].default is not inspect.Parameter.empty and not sized:
            assert own[argument].default == peers[argument].default, argument


def test_mask_is_worn_as_the_peer_wears_it() -> None:
    from diffusers.pipelines.kandinsky.pipeline_kandinsky_inpaint import prepare_mask

    for seed in range(5):
        hole = (torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(seed)) > 0.8).float()
        assert torch.equal(1 - grown(hole), prepare_mask(1 - hole))


# What the peer lacks or does wrong


def plain(
    name: str, scheduler: Any, call: Any, steps: int = 4, kept: Any = None, **conditions: torch.Tensor
) -> torch.Tensor:
    """A loop over the peer's UNet, its input scaled as the scheduler asks, and kept parts put back after each step."""
    unet = components(name)["unet"]
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    noise = torch.randn(1, 4, 8, 8, generator=seeds(3))
    x, generator = noise * scheduler.init_noise_sigma, torch.Generator()
    for k, t in enumerate(scheduler.timesteps):
        out = unet(torch.cat([scheduler.scale_model_input(x, t)] * 2), t, None, added_cond_kwargs=conditions).sample
        u, c = out[:, :4].chunk(2)
        x = scheduler.step(u + 4.0 * (c - u), t, x).prev_sample
        if kept is not None:
            image, mask = kept
            later = scheduler.timesteps[k + 1 : k + 2]
            image = scheduler.add_noise(image, noise, later) if len(later) else image
            x = mask * x + (1 - mask) * image
    del generator
    return x


SIGMAS = diffusers.EulerDiscreteScheduler(**{key: DECODER_SCHEDULE[key] for key in DECODER_SCHEDULE if "beta" in key})
BOTH = torch.cat([EMBEDS["negative_image_embeds"], EMBEDS["image_embeds"]])


@pytest.mark.parametrize(
    "kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler"]
)
def test_any_scheduler_works(kind: str) -> None:
    scheduler = getattr(diffusers, kind).from_config(SIGMAS.config)
    ours = run(
        build(diffusion_kit, "KandinskyV22Pipeline", scheduler=scheduler), **CALL, **EMBEDS, output_type="latent"
    )
    assert distance(ours, plain("KandinskyV22Pipeline", scheduler, CALL, image_embeds=BOTH)) < 1e-4


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_a_sampler_made_of_the_configuration_of_another_takes_no_variance(name: str) -> None:
    """As schedulers are usually swapped: diffusers keeps settings that the new one does not know."""
    pipe = build(diffusion_kit, "KandinskyV22Pipeline")
    results = []
    for given in (LEARNED.config, FIXED.config):
        pipe.scheduler = getattr(diffusers, name).from_config(given)
        results.append(run(pipe, **CALL, **EMBEDS))
    assert torch.equal(*results)


def test_a_learned_variance_under_a_sampler_that_is_no_matrix() -> None:
    scheduler = diffusers.DDPMScheduler(**DECODER_SCHEDULE, variance_type="learned_range", thresholding=True)
    kwargs = {**CALL, **EMBEDS, "output_type": "latent"}
    ours = run(build(diffusion_kit, "KandinskyV22Pipeline", scheduler=scheduler), **kwargs)
    assert distance(ours, run(build(diffusers, "KandinskyV22Pipeline", scheduler=scheduler), **kwargs)) < 1e-4


def test_hint_inpainting_keeps_what_is_black() -> None:
    pipe = build(diffusion_kit, "KandinskyV22ControlnetPipeline", scheduler=SIGMAS)
    family = diffusion_kit.Kandinsky22Pipeline.from_pipe(pipe)
    family.set_progress_bar_config(disable=True)
    ours = run(family, **CALL, **EMBEDS, **MASK, controls=[Control("hint", HINT)], output_type="latent")
    pixels = torch.from_numpy(np.asarray(MASK["image"]).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    image = pipe.movq.encode(pixels).latents
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    theirs = plain(
        "KandinskyV22ControlnetPipeline",
        SIGMAS,
        CALL,
        kept=(image, mask),
        image_embeds=BOTH,
        hint=HINT.repeat(2, 1, 1, 1),
    )
    assert distance(ours, theirs) < 1e-4
    assert torch.allclose(ours[..., 4:], image[..., 4:], atol=1e-4)


def test_hint_has_scale_window_and_mask() -> None:
    pipe = diffusion_kit.Kandinsky22Pipeline(**components("KandinskyV22ControlnetPipeline"))
    pipe.set_progress_bar_config(disable=True)

    def made(**options: Any) -> torch.Tensor:
        controls = [Control("hint", HINT, **options)]
        return run(pipe, **CALL, **EMBEDS, controls=controls, output_type="latent")

    none = made(scale=0.0)
    black = made(mask=half_mask().point(lambda _: 0))
    assert torch.equal(none, black)
    assert torch.equal(none, made(start=0.3, end=0.3))
    whole = made()
    for other in (none, made(scale=0.5), made(end=0.5), made(mask=half_mask())):
        assert distance(other, whole) > 1e-2
    unet = pipe.unet
    block = unet.add_embedding.input_hint_block
    zero = block[-1].weight.clone(), block[-1].bias.clone()
    block[-1].weight.data.zero_(), block[-1].bias.data.zero_()
    try:
        theirs = build(diffusers, "KandinskyV22ControlnetPipeline", unet=unet)
        assert distance(none, torch.as_tensor(LATENTS(theirs, hint=HINT))) < 1e-4
    finally:
        block[-1].weight.data, block[-1].bias.data = zero


def test_a_hint_is_embedded_where_an_offloaded_decoder_runs() -> None:
    pipe = build(diffusion_kit, "KandinskyV22ControlnetPipeline", unet=copy.deepcopy(unet22_hint()))
    plain, brought = run(pipe, hint=HINT, **EMBEDS), []

    class Hook:
        def pre_forward(self, net: Any) -> None:
            brought.append(net)

    pipe.unet._hf_hook = Hook()
    pipe.unet.add_embedding.input_hint_block.register_forward_pre_hook(lambda *_: brought.append("embedded"))
    assert torch.equal(run(pipe, hint=HINT, **EMBEDS), plain)
    assert brought[:2] == [pipe.unet, "embedded"]


def test_a_decoder_with_a_hint_is_a_control_of_a_plain_one(tmp_path: Any) -> None:
    other = unet22_hint()
    other.save_pretrained(tmp_path / "depth")
    pipe = diffusion_kit.Kandinsky22Pipeline(**components("KandinskyV22Pipeline"))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {**CALL, **EMBEDS, "output_type": "latent"}
    plain = run(pipe, **kwargs)
    own = diffusion_kit.Kandinsky22Pipeline(**components("KandinskyV22ControlnetPipeline"))
    own.set_progress_bar_config(disable=True)
    right = run(own, **kwargs, controls=[Control("hint", HINT)])
    assert distance(right, plain) > 1e-2
    for model in (other, str(tmp_path / "depth")):
        assert torch.equal(run(pipe, **kwargs, controls=[Control(model, HINT)]), right)
        assert torch.equal(run(pipe, **kwargs, controls=[Control(model, HINT, scale=0.0)]), plain)
    with pytest.raises(ValueError, match="two controls are decoders with a hint"):
        run(pipe, **kwargs, controls=[Control(other, HINT)] * 2)
    with pytest.raises(ValueError, match="this base takes no hint"):
        run(pipe, **kwargs, controls=[Control(unet22(9), HINT)])
    with pytest.raises(ValueError, match="interrupted"):
        run(pipe, **kwargs, controls=[Control(other, HINT)], callback_on_step_end=interrupted)
    assert torch.equal(run(pipe, **kwargs), plain)


def interrupted(*_: Any) -> None:
    raise ValueError("interrupted")


def LATENTS(pipe: Any, **call: Any) -> torch.Tensor:
    """Latents of a class that gives pictures only."""
    kept: list[torch.Tensor] = []
    run(pipe, **CALL, **EMBEDS, **call, callback=lambda step, t, x: kept.append(x))
    return kept[-1]


@pytest.mark.parametrize(
    ("task", "name"),
    crossed(["text", "image", "inpaint"], ["Kandinsky21Pipeline", "Kandinsky22Pipeline", "Kandinsky3Pipeline"]),
)
def test_picture_k_of_a_batch_is_the_picture_made_alone(name: str, task: str) -> None:
    parts = {"unet": {"21": unet21(9), "22": unet22(9)}[name[9:11]]} if task == "inpaint" and "3" not in name else {}
    pipe = build(diffusion_kit, name, **parts)
    prompts = ["a red fox", "two blue boats"]
    pictures, masks = [picture(1), picture(2)], [half_mask(), lines()]
    call = {**CALL, "output_type": "latent"}
    if task != "text":
        call["strength"] = 0.8
    many: dict[str, Any] = {"generator": seeds(1, 2, 3, 4), "num_images_per_prompt": 2}

    def own(k: int) -> dict[str, Any]:
        one: dict[str, Any] = {}
        if "22" not in name:
            one |= {"prompt": prompts[k], "negative_prompt": ["x", "long and dark"][k]}
        if "3P" not in name:
            one |= {"image_embeds": embeds(k), "negative_image_embeds": embeds(k + 5)}
        one |= {"image": pictures[k]} if task != "text" else {}
        return one | ({"mask_image": masks[k]} if task == "inpaint" else {})

    both = {}
    for key in own(0):
        pair = [own(0)[key], own(1)[key]]
        both[key] = torch.cat(pair) if isinstance(pair[0], torch.Tensor) else pair
    result = run(pipe, **call, **both, **many)
    for k in range(4):
        assert distance(run(pipe, seed=k + 1, **call, **own(k // 2)), result[k : k + 1]) < 1e-4


def test_adapters_work_on_kandinsky() -> None:
    """A T2I-Adapter's residuals go to what each block gives, which is also its last skip."""
    adapter = make_adapter(kind="full_adapter", channels=CHANNELS[:2], downscale=16)
    pipe = build(diffusion_kit, "KandinskyV22Pipeline")
    size = {**CALL, "height": 128, "width": 128}
    controlled = {**size, **EMBEDS, "controls": [Control(adapter, lines(size=128), scale=0.8)], "output_type": "latent"}
    ours = run(pipe, **controlled)
    pixels = torch.from_numpy(np.asarray(lines(size=128)).copy()).permute(2, 0, 1)[None].float() / 255
    features = adapter(pixels)
    hooks = []
    for k, block in enumerate(pipe.unet.down_blocks[:2]):

        def add(module: Any, inputs: Any, output: Any, k: int = k) -> Any:
            h = output[0] + 0.8 * features[k].repeat(2, 1, 1, 1)
            return h, (*output[1][:-1], h)

        hooks.append(block.register_forward_hook(add))
    try:
        theirs = run(build(diffusers, "KandinskyV22Pipeline"), **size, **EMBEDS, output_type="latent")
    finally:
        for hook in hooks:
            hook.remove()
    assert distance(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    "name", light(["Kandinsky21Pipeline", "Kandinsky22Pipeline", "Kandinsky3Pipeline"], "Kandinsky22Pipeline")
)
def test_networks_are_as_before_and_a_step_is_one_graph(name: str) -> None:
    pipe = build(diffusion_kit, name)
    before = {key: id(value) for key, value in pipe.unet.attn_processors.items()}
    call = {**CALL, **({} if "22" in name else {"prompt": "a"}), **({} if "3P" in name else EMBEDS)}
    eager = run(pipe, **call, output_type="latent")
    engine = pipe.engine = Compiled(backend="eager")
    assert distance(run(pipe, **call, output_type="latent"), eager) < 1e-5
    assert len(engine.graphs) == 1
    run(pipe, **{**call, "guidance_scale": 2.5}, output_type="latent")
    assert len(engine.graphs) == 1
    assert not engine.notes
    assert {key: id(value) for key, value in pipe.unet.attn_processors.items()} == before


@pytest.mark.parametrize(
    "name",
    [
        "Kandinsky22Pipeline",
        pytest.param("Kandinsky21Pipeline", marks=pytest.mark.heavy),
        pytest.param("Kandinsky3Pipeline", marks=pytest.mark.heavy),
        pytest.param("KandinskyV22ControlnetPipeline", marks=pytest.mark.heavy),
    ],
)
def test_own_forward_where_the_caller_compiled(name: str) -> None:
    pipe = build(diffusion_kit, name)
    call = {**CALL, **({} if "22" in name else {"prompt": "a"}), **({} if "3P" in name else EMBEDS)}
    call |= {"hint": HINT} if "Controlnet" in name else {}
    eager = run(pipe, **call)
    compiled = build(diffusion_kit, name, unet=torch.compile(pipe.unet, backend="eager"))
    assert "compiled by the caller" in compiled.explain()
    assert distance(run(compiled, **call), eager) < PIXELS


def test_callbacks() -> None:
    pipe = build(diffusion_kit, "KandinskyV22InpaintPipeline")
    seen: dict[str, Any] = {}

    def swap(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.update({key: tuple(value.shape) for key, value in tensors.items()})
        return {"image_embeds": torch.cat([tensors["negative_image_embeds"]] * 2)} if step == 1 else {}

    names = ["latents", "image_embeds", "negative_image_embeds", "masked_image", "mask_image"]
    call = {**CALL, **EMBEDS, **MASK, "output_type": "latent"}
    changed = run(pipe, **call, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    assert seen["image_embeds"] == (2, WIDTH)
    assert seen["masked_image"] == (1, 4, 8, 8)
    assert seen["mask_image"] == (1, 1, 8, 8)
    assert distance(changed, run(pipe, **call)) > 1e-2

    three = build(diffusion_kit, "Kandinsky3Pipeline")

    def weaker(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {}

    call = {**CALL, "prompt": "a fox", "output_type": "latent"}
    assert distance(run(three, **call, callback_on_step_end=weaker), run(three, **call)) > 1e-2


@pytest.mark.parametrize(
    ("scheduler", "name"),
    crossed([DDIM, LEARNED, SIGMAS], ["Kandinsky21Pipeline", "KandinskyV22ControlnetPipeline", "Kandinsky3Pipeline"]),
)
def test_no_host_read_and_no_new_tensor_in_a_step(name: str, scheduler: Any) -> None:
    from test_step import CREATIONS, SYNCS, Count

    pipe = build(diffusion_kit, name, scheduler=scheduler)
    family = diffusion_kit.Kandinsky22Pipeline.from_pipe(pipe) if "Controlnet" in name else pipe
    family.set_progress_bar_config(disable=True)
    call = {**CALL, **({} if "Controlnet" in name else {"prompt": "a fox"}), **({} if "3P" in name else EMBEDS)}
    call |= {"controls": [Control("hint", HINT, scale=0.7, mask=half_mask())]} if "Controlnet" in name else {}
    with Count() as count:

        def mark(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
            count.mark()
            return {}

        run(family, **call, callback_on_step_end=mark, output_type="latent")
    assert len(count.steps) == 3
    for operations in count.steps:
        assert not (SYNCS | CREATIONS) & set(operations)
        assert not [operation for operation in operations if "rand" in operation]
        assert len(operations) == len(count.steps[0])


@pytest.mark.parametrize("name", ["Kandinsky21Pipeline", "KandinskyV22ControlnetPipeline", "Kandinsky3Pipeline"])
def test_a_step_on_fake_cuda_tensors(name: str) -> None:
    from test_step import captured, runs_on_fake_cuda

    call = {**CALL, **({} if "Controlnet" in name else {"prompt": "a fox"}), **({} if "3P" in name else EMBEDS)}
    call |= {"hint": HINT, "output_type": "np"} if "Controlnet" in name else {}
    runs_on_fake_cuda(*captured(build(diffusion_kit, name), **call))


def test_one_run_hands_over_to_another() -> None:
    pipe = build(diffusion_kit, "Kandinsky22Pipeline", scheduler=DDIM)
    call = {**CALL, "num_inference_steps": 10, **EMBEDS, "output_type": "latent"}
    half = run(pipe, **call, denoising_end=0.5)
    assert distance(run(pipe, **call, image=half, denoising_start=0.5), run(pipe, **call)) < 1e-5
