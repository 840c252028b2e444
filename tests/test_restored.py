"""Afterwards, whatever happened, the networks are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import lines, make_adapter, make_controlnet, pipeline, seeds, unet

from diffusion_kit import Control, SDXLPipeline


def snapshot(net: Any) -> dict[str, Any]:
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in net.modules()]
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "processors": net.attn_processors,
        "hooks": [(dict(a), dict(b)) for a, b in hooks],
        "forwards": ["forward" in vars(m) for m in net.modules()],
        "forward": net.forward.__func__,
        "training": [m.training for m in net.modules()],
    }


@contextmanager
def unchanged(*nets: Any) -> Iterator[None]:
    before = [snapshot(net) for net in nets]
    yield
    for net, old in zip(nets, before, strict=True):
        new = snapshot(net)
        assert new["weights"].keys() == old["weights"].keys()
        assert all(torch.equal(new["weights"][name], value) for name, value in old["weights"].items())
        assert new["processors"].keys() == old["processors"].keys()
        assert all(new["processors"][name] is value for name, value in old["processors"].items())
        assert all(new[key] == old[key] for key in ("hooks", "forwards", "forward", "training"))


def call(pipe: Any, **more: Any) -> Any:
    controls = [Control(make_adapter(), lines(1)), Control(controlnet, lines(2))]
    return pipe("a fox", controls=controls, num_inference_steps=4, generator=seeds(1), output_type="latent", **more)


controlnet = make_controlnet()


class Stop(Exception):
    """Raised by a test's callback."""


def test_after_a_run() -> None:
    with unchanged(unet(), controlnet):
        call(pipeline(SDXLPipeline))


def test_after_a_callback_that_raises() -> None:
    def fail(*_: Any) -> None:
        raise Stop

    with unchanged(unet(), controlnet), pytest.raises(Stop):
        call(pipeline(SDXLPipeline), callback_on_step_end=fail)


def test_after_an_error_in_the_network() -> None:
    def fail(*_: Any) -> None:
        raise Stop

    with unchanged(unet(), controlnet):
        hook = controlnet.mid_block.register_forward_hook(fail)
        with pytest.raises(Stop):
            call(pipeline(SDXLPipeline))
        hook.remove()


def test_after_a_cancel_which_stops_at_once() -> None:
    seen: list[int] = []

    def cancel(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append(k)
        pipe._interrupt = k == 1
        return {}

    pipe = pipeline(SDXLPipeline)
    with unchanged(unet(), controlnet):
        result = call(pipe, callback_on_step_end=cancel).images
    assert seen == [0, 1]
    assert torch.isfinite(result).all()
    assert not torch.equal(result, call(pipe).images), "the next run is not cancelled"


def test_lora_scale_holds_for_the_run_only() -> None:
    """A LoRA's scale is applied once around the run, in the cached keys as well, and gives the peer's picture."""
    import copy

    import diffusers
    from conftest import distance
    from peft import LoraConfig

    net = copy.deepcopy(unet())
    net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    pipe, peer = pipeline(SDXLPipeline, unet=net), pipeline(diffusers.StableDiffusionXLPipeline, unet=net)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    scaled = {"cross_attention_kwargs": {"scale": 0.3}}
    with unchanged(net):
        ours = pipe("a fox", generator=seeds(1), **options, **scaled).images
    assert distance(ours, peer("a fox", generator=seeds(1), **options, **scaled).images) < 1e-4
    assert distance(ours, pipe("a fox", generator=seeds(1), **options).images) > 1e-3
