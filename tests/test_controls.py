"""Controls in every task and mixture, where diffusers has no pipeline to compare with: reductions, counts, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    crossed,
    distance,
    half_mask,
    light,
    lines,
    make_adapter,
    make_controlnet,
    picture,
    pipeline,
    seeds,
    unet,
)
from PIL import Image

import diffusion_kit
from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.adapters.control import fading

TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(), "strength": 0.7},
    "inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 0.8},
}
WHITE, BLACK = Image.new("L", (64, 64), 255), Image.new("L", (64, 64), 0)
SAME = 1e-5


@pytest.fixture(scope="module")
def adapter() -> Any:
    return make_adapter()


@pytest.fixture(scope="module")
def controlnet() -> Any:
    return make_controlnet()


def run(controls: Any = (), task: str = "text", pipe: Any = None, **more: Any) -> torch.Tensor:
    pipe = pipe or pipeline(SDXLPipeline)
    call = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds(1)}
    return pipe(**{**call, **TASKS[task], **more}, controls=controls, output_type="latent").images


@pytest.mark.parametrize("task", TASKS)
def test_every_mixture_in_every_task_is_its_own_result(task: str, adapter: Any, controlnet: Any) -> None:
    a, c = Control(adapter, lines(1)), Control(controlnet, lines(2))
    results = [run(controls, task) for controls in ([], [a], [c], [a, c])]
    for i, first in enumerate(results):
        assert torch.isfinite(first).all()
        for second in results[:i]:
            assert distance(first, second) > 1e-2
    assert distance(run([c, a], task), results[3]) < SAME, "order matters"


@pytest.mark.parametrize(("task", "kind"), crossed(TASKS, ["adapter", "controlnet"]))
def test_reductions(task: str, kind: str, request: pytest.FixtureRequest) -> None:
    net = request.getfixturevalue(kind)
    nothing, full = run(task=task), run([Control(net, lines())], task)
    for off in ({"scale": 0.0}, {"mask": BLACK}, {"start": 0.5, "end": 0.5}, {"scale": [0.0] * 4}):
        assert torch.equal(run([Control(net, lines(), **off)], task), nothing)
    for same in ({"mask": WHITE}, {"scale": [1.0] * 4}, {"start": 0.0, "end": 1.0}):
        assert distance(run([Control(net, lines(), **same)], task), full) < SAME
    assert distance(run([Control(net, lines(), scale=0.5)], task), full) > 1e-3


@pytest.mark.parametrize("task", ["image", "inpaint"])
def test_adapter_in_a_task_is_a_plain_loop_with_its_residuals(task: str, adapter: Any) -> None:
    """Image-to-image and inpainting with a T2I-Adapter against a UNet whose forward adds the residuals itself."""

    class WithResiduals(torch.nn.Module):
        """Stands in for the peer's UNet: the same network, the adapter's features on every call."""

        def __init__(self, net: Any, features: list[torch.Tensor]):
            super().__init__()
            self.net, self.features = net, features
            self.config, self.dtype, self.add_embedding = net.config, net.dtype, net.add_embedding
            self.device = torch.device("cpu")

        def forward(self, x: torch.Tensor, t: Any, **kwargs: Any) -> Any:
            residuals = [feature.repeat(len(x), 1, 1, 1) for feature in self.features]
            return self.net(x, t, **kwargs, down_intrablock_additional_residuals=residuals)

    import numpy as np

    pixels = torch.from_numpy(np.array(lines())).permute(2, 0, 1)[None] / 255
    cls = {"image": "StableDiffusionXLImg2ImgPipeline", "inpaint": "StableDiffusionXLInpaintPipeline"}[task]
    peer = pipeline(getattr(diffusers, cls))
    peer.unet = WithResiduals(unet(), [0.8 * feature for feature in adapter(pixels)])
    call = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds(1)}
    theirs = peer(**{**call, **TASKS[task]}, output_type="latent").images
    assert distance(run([Control(adapter, lines(), scale=0.8)], task), theirs) < 1e-4
    assert distance(run(task=task), theirs) > 1e-2


@pytest.mark.parametrize("kind", ["adapter", "controlnet"])
def test_images_and_masks_of_each_prompt_with_several_pictures_of_each(kind: str, request: Any) -> None:
    net = request.getfixturevalue(kind)
    pipe, masks, images = pipeline(SDXLPipeline), [half_mask(), WHITE], [lines(0), lines(1)]
    call = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = pipe(
        ["a fox", "a cat"], num_images_per_prompt=2, latents=noise, controls=[Control(net, images, mask=masks)], **call
    )
    for k in range(4):
        own = Control(net, images[k // 2], mask=masks[k // 2])
        single = pipe(["a fox", "a cat"][k // 2], latents=noise[k : k + 1], controls=[own], **call)
        assert distance(made.images[k : k + 1], single.images) < 1e-4


def test_region_mask_leaves_the_residuals_outside_untouched(adapter: Any, controlnet: Any) -> None:
    from diffusion_kit.adapters.control import Site, encode_control

    site = Site(unet(), 64, 64, (16, 16), 1, 1, torch.tensor([500.0]), torch.device("cpu"))
    encoded = encode_control(Control(adapter, lines(), mask=half_mask()), site)
    plain = encode_control(Control(adapter, lines()), site)
    for masked, feature in zip(encoded.tensors({}, 1), plain.tensors({}, 1), strict=True):
        w = feature.shape[-1]
        assert torch.equal(masked[..., : w // 2], feature[..., : w // 2])
        assert not masked[..., w // 2 :].any()
    masked = run([Control(controlnet, lines(), mask=half_mask())])
    assert distance(masked, run([Control(controlnet, lines())])) > 1e-2
    assert distance(masked, run()) > 1e-2


@pytest.mark.parametrize("kind", ["adapter", "controlnet"])
def test_modes(kind: str, request: pytest.FixtureRequest) -> None:
    net = request.getfixturevalue(kind)
    by_mode = {m: run([Control(net, lines(), mode=m)]) for m in ("balanced", "prompt", "control")}
    assert distance(by_mode["balanced"], by_mode["control"]) > 1e-3
    assert distance(by_mode["prompt"], by_mode["control"]) > 1e-3
    alone = {m: run([Control(net, lines(), mode=m)], guidance_scale=1.0) for m in ("balanced", "prompt", "control")}
    assert distance(alone["balanced"], alone["control"]) < SAME, "without guidance there is only one half"
    assert distance(alone["prompt"], alone["control"]) > 1e-3


def test_fading_of_the_prompt_mode_is_the_peers() -> None:
    """Equal ratios from 0.1 at the shallowest to 1 at the middle, as ControlNetModel's guess mode scales its outputs."""
    ratios = [b / a for a, b in zip(fading(10, "prompt"), fading(10, "prompt")[1:], strict=False)]
    assert ratios == pytest.approx([10 ** (1 / 9)] * 9)
    assert (fading(10, "prompt")[0], fading(10, "prompt")[-1]) == pytest.approx((0.1, 1.0))
    assert set(fading(10, "balanced")) == set(fading(10, "control")) == {1.0}


def test_scale_by_level(controlnet: Any, adapter: Any) -> None:
    for net in (controlnet, adapter):
        one = [run([Control(net, lines(), scale=[float(k == level) for k in range(4)])]) for level in range(4)]
        for level, result in enumerate(one):
            assert distance(result, run()) > 1e-4, f"level {level} does nothing"
            assert all(distance(result, other) > 1e-4 for other in one[:level])


@pytest.mark.parametrize(
    ("start", "end", "scheduler"),
    crossed(
        [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.3, 0.9), (0.9, 1.0)],
        ["EulerDiscreteScheduler", "HeunDiscreteScheduler"],
    ),
)
def test_controlnet_runs_in_the_steps_of_its_window_only(
    start: float, end: float, scheduler: str, controlnet: Any
) -> None:
    steps, calls = 8, []
    hook = controlnet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    pipe = pipeline(SDXLPipeline, scheduler=getattr(diffusers, scheduler)())
    try:
        run([Control(controlnet, lines(), start=start, end=end)], pipe=pipe, num_inference_steps=steps)
    finally:
        hook.remove()
    inside = [i for i in range(steps) if start <= i / steps and (i + 1) / steps <= end]
    calls_of = {i: 2 if scheduler.startswith("Heun") and i < steps - 1 else 1 for i in range(steps)}
    assert len(calls) == sum(calls_of[i] for i in inside)


def test_adapter_and_control_image_are_encoded_once(adapter: Any, controlnet: Any) -> None:
    counts = {"adapter": 0, "image": 0, "text": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    keys = next(m for n, m in unet().named_modules() if n.endswith("attn2.to_k"))
    hooks = [
        adapter.adapter.register_forward_hook(count("adapter")),
        controlnet.controlnet_cond_embedding.register_forward_hook(count("image")),
        keys.register_forward_hook(count("text")),
    ]
    run([Control(adapter, lines()), Control(controlnet, lines())], num_inference_steps=9)
    for hook in hooks:
        hook.remove()
    assert counts == {"adapter": 1, "image": 1, "text": 1}


def test_guidance_interval_computes_no_unconditional_half_outside() -> None:
    rows: list[int] = []
    hook = unet().mid_block.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    result = run(guidance_interval=(0.25, 0.75), num_inference_steps=8)
    hook.remove()
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]
    assert distance(result, run(num_inference_steps=8)) > 1e-3
    assert torch.equal(run(guidance_interval=(0.0, 0.0)), run(guidance_scale=1.0))
    assert torch.equal(run(guidance_interval=(0.0, 1.0)), run())


@pytest.mark.parametrize("task", light(TASKS, "inpaint"))
def test_picture_k_belongs_to_prompt_k(task: str, adapter: Any, controlnet: Any) -> None:
    """2 prompts x 2 control images x 2 images per prompt, against each picture made alone."""
    prompts, one, two = ["a red fox", "two blue boats"], [lines(1), lines(2)], [lines(3), lines(4)]
    pictures = {"image": [picture(5), picture(6)]} if task != "text" else {}
    sizes = {"negative_original_size": (9, 90), "negative_target_size": (80, 10), "crops_coords_top_left": (5, 1)}
    batch = run(
        [Control(adapter, one), Control(controlnet, two)],
        task,
        prompt=prompts,
        num_images_per_prompt=2,
        generator=seeds(1, 2, 3, 4),
        **pictures,
        **sizes,
    )
    for k in range(4):
        p = k // 2
        alone = run(
            [Control(adapter, one[p]), Control(controlnet, two[p])],
            task,
            prompt=prompts[p],
            generator=seeds(k + 1),
            **({"image": pictures["image"][p]} if pictures else {}),
            **sizes,
        )
        assert distance(batch[k : k + 1], alone) < 1e-4, f"picture {k}"


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_generator_for_each_image_gives_the_same_alone(scheduler: str) -> None:
    pipe = pipeline(SDXLPipeline, scheduler=getattr(diffusers, scheduler)())
    both = run(pipe=pipe, num_images_per_prompt=2, generator=seeds(1, 2), guidance_scale=1.0)
    for k in range(2):
        assert distance(both[k : k + 1], run(pipe=pipe, generator=seeds(k + 1), guidance_scale=1.0)) < 1e-4


def test_multi_adapter_number_is_shared_out() -> None:
    first, second = make_adapter(3), make_adapter(30)
    multi = diffusers.MultiAdapter([first, second])
    images = [lines(1), lines(2)]
    together = run([Control(multi, images)])
    assert distance(together, run([Control(multi, images, scale=[0.5, 0.5])])) < SAME
    apart = run([Control(first, images[0], scale=0.5), Control(second, images[1], scale=0.5)])
    assert distance(together, apart) < 1e-4
    peer = pipeline(diffusion_kit.StableDiffusionXLAdapterPipeline, adapter=[first, second])
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds(1), "output_type": "latent"}
    assert distance(peer("a red fox", image=images, **call).images, together) < 1e-4


def test_a_control_beside_the_peers_adapter(adapter: Any, controlnet: Any) -> None:
    """A peer-named class takes `controls` too."""
    pipe = pipeline(diffusion_kit.StableDiffusionXLAdapterPipeline, adapter=adapter)
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds(1), "output_type": "latent"}
    both = pipe("a red fox", image=lines(1), controls=[Control(controlnet, lines(2))], **call).images
    assert distance(both, run([Control(adapter, lines(1)), Control(controlnet, lines(2))])) < SAME


def test_networks_with_processors_of_their_own_run_their_own_forward(adapter: Any, controlnet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    controls = [Control(adapter, lines(1), mask=half_mask()), Control(controlnet, lines(2), mode="prompt")]
    fast = run(controls)
    before = {net: net.attn_processors for net in (unet(), controlnet)}
    for net in before:
        net.set_attn_processor(AttnProcessor())
    try:
        assert "attention processors" in pipeline(SDXLPipeline).explain()
        assert distance(run(controls), fast) < 1e-4
    finally:
        for net, processors in before.items():
            net.set_attn_processor(dict(processors))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Control("x", None, scale=float("nan")), "finite"),
        (lambda: Control("x", None, start=0.7, end=0.2), "0 <= start <= end <= 1"),
        (lambda: Control("x", None, mode="loud"), "mode is 'loud'"),  # type: ignore[arg-type]
        (lambda: run([Control(make_adapter(), lines(), scale=[1.0, 2.0])]), "2 levels; the base has 4"),
        (lambda: run([Control(make_adapter(channels=(32, 32, 64, 64)), lines())]), "32 x 8 x 8.*the UNet takes"),
        (lambda: run([Control(make_adapter(downscale=16), lines())]), "does not fit the base"),
        (lambda: run([Control("sketch", lines())]), "no control 'sketch' comes with the base"),
        (lambda: run([Control(make_adapter(), [lines()] * 3)]), "3 entries of a control's image for 1 prompts"),
        (lambda: run([Control(make_adapter(), "a path")]), "not a picture"),
    ],
)
def test_value_errors_say_what_is_wrong(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.2), (0.0, 1.5), (-0.1, 1.0), (0.4, 0.4)])
def test_windows_of_the_peer_named_classes_are_checked(start: float, end: float, controlnet: Any) -> None:
    pipe = pipeline(diffusion_kit.StableDiffusionXLControlNetPipeline, controlnet=controlnet)
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        pipe("a", image=lines(), num_inference_steps=2, control_guidance_start=start, control_guidance_end=end)


def test_type_errors_name_what_is_known() -> None:
    with pytest.raises(TypeError, match="Linear is no control: known are .*T2IAdapter"):
        run([Control(torch.nn.Linear(1, 1), lines())])
    with pytest.raises(TypeError, match="must hold Control values"):
        run([make_adapter()])
    with pytest.raises(TypeError, match="no argument 'guidance_scal'; did you mean 'guidance_scale'"):
        run(guidance_scal=3.0)
    wide = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 16, 16))
    wide.register_to_config(cross_attention_dim=99)
    with pytest.raises(ValueError, match="text of width 99, the base's is 48"):
        run([Control(wide, lines())])
