"""Instruct-pix2pix bases: the same picture as diffusers, in every task, beside every other control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    crossed,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_sd_controlnet,
    make_sd_unet,
    make_unet,
    picture,
    pipeline,
    sd_pipeline,
    seeds,
)
from PIL import Image

from diffusion_kit import AutoPipelineForText2Image, Control, SD15Pipeline, SDXLPipeline
from diffusion_kit.pipelines.auto import class_name

SAME = 1e-5
CALL = {"prompt": "make it a fox", "num_inference_steps": 5, "guidance_scale": 4.0}
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": picture(5), "strength": 0.7},
    "inpaint": {"image": picture(5), "mask_image": half_mask(), "strength": 0.8},
}
PEERS = {
    "sd": (SD15Pipeline, diffusers.StableDiffusionInstructPix2PixPipeline, sd_pipeline, lambda: make_sd_unet(8)),
    "sdxl": (SDXLPipeline, diffusers.StableDiffusionXLInstructPix2PixPipeline, pipeline, lambda: make_unet(8)),
}
WHITE, BLACK = Image.new("L", (64, 64), 255), Image.new("L", (64, 64), 0)


@pytest.fixture(scope="module")
def net() -> Any:
    net = make_sd_unet(8)
    net.conv_in.weight.data[:, 4:] *= 4  # the picture is loud, so that it is seen in the result
    return net


def base(family: str) -> tuple[Any, Any]:
    ours, theirs, make, unet = PEERS[family]
    parts = {"unet": unet()}
    return make(ours, **parts), make(theirs, **parts)


def run(net: Any, controls: Any, task: str = "text", **more: Any) -> torch.Tensor:
    call = {**CALL, "generator": seeds(1), **TASKS[task], **more}
    return sd_pipeline(SD15Pipeline, unet=net)(**call, controls=controls, output_type="latent").images


def photo(**more: Any) -> Control:
    return Control("instruct", picture(3), **{"scale": 1.5, **more})


# beside the picture: (text guidance, image guidance, more of the call)
@pytest.mark.parametrize(
    ("text", "image", "more", "family"),
    crossed([(4.0, 1.5, {}), (4.0, 1.0, {}), (1.0, 1.5, {}), (4.0, 2.0, {"num_images_per_prompt": 2})], PEERS),
)
def test_same_picture_as_the_peer(family: str, text: float, image: float, more: dict[str, Any]) -> None:
    ours, theirs = base(family)
    call: dict[str, Any] = {**CALL, "guidance_scale": text, "output_type": "latent", **more}
    want = theirs(image=picture(3), image_guidance_scale=image, generator=seeds(1), **call).images
    got, without, other = (
        ours(controls=[control], generator=seeds(1), **call).images
        for control in (photo(scale=image), photo(scale=0.0), photo(scale=image + 1))
    )
    assert distance(got, want) < 1e-4
    assert distance(without, want) > 1e-2
    assert (distance(other, want) > 1e-2) == (text > 1)


class Guided(torch.nn.Module):
    """Stands in for a plain UNet in the peer's pipelines: of (unconditional, conditional) it makes what their guidance
    turns into eq. 3, from one call of the network for each of its three predictions, residuals added on every one."""

    def __init__(self, net: Any, latents: torch.Tensor, scale: float, controlnet: Any, adapter: Any):
        super().__init__()
        self.net, self.latents, self.scale, self.controlnet, self.adapter = net, latents, scale, controlnet, adapter
        self.config = diffusers.configuration_utils.FrozenDict({**net.config, "in_channels": 4})
        self.dtype, self.device = net.dtype, torch.device("cpu")

    def forward(self, x: torch.Tensor, t: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        def predict(states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            own = x[:1]
            down, mid = self.controlnet(own, t, states, pixels(lines(2)), conditioning_scale=0.7, return_dict=False)
            return self.net(
                torch.cat([own, latents], 1),
                t,
                encoder_hidden_states=states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
                down_intrablock_additional_residuals=[feature.clone() for feature in self.adapter(pixels(lines(1)))],
            ).sample

        empty, text = encoder_hidden_states.chunk(2)
        nothing = torch.zeros_like(self.latents)
        none, picture, both = predict(empty, nothing), predict(empty, self.latents), predict(text, self.latents)
        unconditional = none + self.scale * (picture - none)
        return (torch.cat([unconditional, unconditional + both - picture]),)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("scale", "task"), crossed([1.0, 1.5], TASKS))
def test_in_every_task_beside_a_controlnet_and_an_adapter(task: str, scale: float, net: Any) -> None:
    controlnet, adapter = make_sd_controlnet(), make_adapter(kind="full_adapter", downscale=4, channels=(32, 64, 64))
    controls = [photo(scale=scale), Control(controlnet, lines(2), scale=0.7), Control(adapter, lines(1))]
    name = {"text": "", "image": "Img2Img", "inpaint": "Inpaint"}[task]
    peer = sd_pipeline(getattr(diffusers, f"StableDiffusion{name}Pipeline"))
    latents = peer.vae.encode(2 * pixels(picture(3)) - 1).latent_dist.mode()
    peer.unet = Guided(net, latents, scale, controlnet, adapter)
    want = peer(**CALL, **TASKS[task], generator=seeds(1), output_type="latent").images
    assert distance(run(net, controls, task), want) < 1e-4
    for fewer in ([photo(scale=0.0), *controls[1:]], [controls[0], controls[1]], [controls[0], controls[2]]):
        assert distance(run(net, fewer, task), want) > 1e-2


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_batch_is_single_runs(scale: float, net: Any) -> None:
    prompts, photos = ["make it a fox", "in winter"], [picture(3), picture(4)]
    control = Control("instruct", photos, scale=scale)
    batch = run(net, [control], prompt=prompts, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4))
    for k, row in enumerate(batch):
        one = [Control("instruct", photos[k // 2], scale=scale)]
        assert distance(row, run(net, one, prompt=prompts[k // 2], generator=seeds(k + 1))[0]) < 1e-4
    assert distance(run(net, [photo()], generator=seeds(1))[0], batch[1]) > 1e-2


def test_reductions(net: Any) -> None:
    """Without the picture its channels are zero: the network with a narrower first convolution."""
    narrow = make_sd_unet()
    narrow.load_state_dict({**net.state_dict(), "conv_in.weight": net.conv_in.weight[:, :4]})
    nothing, full = run(narrow, []), run(net, [photo()])
    for off in ({"scale": 0.0}, {"mask": BLACK}, {"start": 0.5, "end": 0.5}):
        assert distance(run(net, [photo(**off)]), nothing) < SAME
    assert distance(run(net, [photo(mask=WHITE)]), full) < SAME
    assert distance(full, nothing) > 1e-2
    assert distance(run(net, [photo(scale=1.0)]), run(net, [photo(scale=1.0 + 1e-7)])) < 1e-4, "eq. 3 at s_I = 1"
    alone = [run(net, [photo(scale=scale)], guidance_scale=1.0) for scale in (1.5, 7.0)]
    assert torch.equal(*alone), "without guidance of the text there is none of the picture"


def test_window_and_mask_are_where_the_picture_is_seen(net: Any) -> None:
    seen: list[torch.Tensor] = []
    hook = net.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 4:]))
    try:
        run(net, [photo(mask=half_mask(), end=0.6)])
    finally:
        hook.remove()
    assert [len(x) for x in seen] == [3, 3, 3, 2, 2]
    assert not any(x.any() for x in seen[3:])
    for x in seen[:3]:
        assert not x[0].any()
        assert x[1:, :, :, :8].any()
        assert not x[1:, :, :, 8:].any()


@pytest.mark.parametrize("family", PEERS)
def test_folders_of_both_sides(family: str, tmp_path: Path) -> None:
    ours, theirs = base(family)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert class_name(tmp_path / "ours") == class_name(tmp_path / "theirs") == type(theirs).__name__
    call = {"prompt": "make it a fox", "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
    results = []
    for folder in ("ours", "theirs"):
        pipe = AutoPipelineForText2Image.from_pretrained(tmp_path / folder)
        assert type(pipe) is type(ours)
        results.append(pipe(controls=[photo()], generator=seeds(1), **call).images)
    read = type(theirs).from_pretrained(tmp_path / "ours")
    results.append(read(image=picture(3), image_guidance_scale=1.5, generator=seeds(1), **call).images)
    assert torch.equal(results[0], results[1])
    assert distance(results[0], results[2]) < 1e-4


ERRORS: dict[str, tuple[Callable[[], list[Control]], str]] = {
    "none": (list, r"takes a picture itself: give one Control\('instruct', picture\)"),
    "two": (lambda: [photo(), photo()], r"give one Control\('instruct', picture\)"),
    "levels": (lambda: [photo(scale=[1.0, 2.0])], "lists 2 levels"),
    "mode": (lambda: [photo(mode="prompt")], "'instruct' has no residuals: it must be 'balanced'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name: str, net: Any) -> None:
    make, message = ERRORS[name]
    with pytest.raises(ValueError, match=message) as error:
        run(net, make())
    assert "\n" not in str(error.value)


def test_another_base_takes_no_picture() -> None:
    with pytest.raises(ValueError, match="this base takes no 'instruct' control: its UNet has 4 input channels"):
        run(make_sd_unet(), [photo()])
