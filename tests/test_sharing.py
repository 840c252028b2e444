"""What several calls share is encoded once, and nothing stale is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import components, distance, lines, make_adapter, make_controlnet, picture, pipeline, seeds
from test_mixtures import run
from torch import nn

from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.models.packed import Packed, Packing
from diffusion_kit.sampling.engines import Answers, Remembered


def counting(net: nn.Module) -> Callable[[], int]:
    """How often it ran since the last look."""
    ran: list[int] = []
    net.register_forward_hook(lambda *_: ran.append(1))

    def look() -> int:
        number = len(ran)
        ran.clear()
        return number

    return look


@pytest.fixture
def pipe() -> Any:
    return pipeline(SDXLPipeline, **copy.deepcopy(components()))


def test_shared_prompts_and_pictures_are_encoded_once(pipe: Any) -> None:
    adapter, net = make_adapter(), make_controlnet()
    controls = [Control(adapter, lines(1), scale=0.5), Control(net, lines(2), end=0.5)]
    plain = [run(controls, pipe=pipe, prompt=prompt) for prompt in ("a cat", "a dog", "a cat")]
    looks = [counting(part) for part in (pipe.text_encoder, adapter, net.controlnet_cond_embedding)]
    with pipe.sharing():
        for k, prompt in enumerate(("a cat", "a dog", "a cat")):
            assert torch.equal(run(controls, pipe=pipe, prompt=prompt), plain[k])
        texts, adapters, embeddings = (look() for look in looks)
        assert texts == 2
        assert adapters == embeddings == 1
        run([Control(adapter, lines(3))], pipe=pipe, prompt="a cat")
        assert [look() for look in looks] == [0, 1, 0]
    run(controls, pipe=pipe, prompt="a cat")
    assert [look() for look in looks] == [1, 1, 1], "nothing is shared outside"


def test_start_pictures_are_encoded_once(pipe: Any) -> None:
    call: dict[str, Any] = {"pipe": pipe, "strength": 0.5, "num_inference_steps": 4}
    starts = [picture(1), picture(2), picture(1)]
    plain = [run(image=start, **call) for start in starts]
    look = counting(pipe.vae.encoder)
    with pipe.sharing():
        for start, alone in zip(starts, plain, strict=True):
            assert torch.equal(run(image=start, **call), alone)
        assert look() == 2
        assert not torch.equal(run(image=starts[0], **call, generator=seeds(5)), plain[0]), "it is drawn anew"
        assert look() == 0


def test_packed_networks_are_asked_once_and_stay_packed(pipe: Any) -> None:
    """To see whether weights have changed must not unpack them."""
    net = make_controlnet()
    controls = [Control(net, lines(2))]
    plain = run(controls, pipe=pipe)
    pipe.engine = Packing()
    looks = [counting(part) for part in (pipe.text_encoder, net.controlnet_cond_embedding)]
    with pipe.sharing():
        for _ in range(4):
            assert distance(run(controls, pipe=pipe), plain) < 1e-5
        texts, embeddings = (look() for look in looks)
        assert texts == 1
        assert embeddings <= 2, "the first time before its network is packed"
        assert any(isinstance(part, Packed) for part in pipe.text_encoder.modules())
        pipe.text_encoder.encoder.layers[0].mlp.fc1.weight.data.mul_(2)
        run(controls, pipe=pipe)
        assert looks[0]() == 1, "other weights"


@pytest.mark.parametrize("edit", [lambda weight: weight.mul_(3), lambda weight: weight.data.mul_(3)])
def test_other_weights_are_seen(edit: Any, pipe: Any) -> None:
    """Those, too, that peft merges: it edits `.data`, which torch does not count."""
    adapter = make_adapter()
    controls = [Control(adapter, lines(1))]
    with pipe.sharing():
        before = run(controls, pipe=pipe)
        for net in (pipe.text_encoder, adapter):
            edit(next(net.parameters()))
            after = run(controls, pipe=pipe)
            assert not torch.equal(after, before)
            before = after
    assert torch.equal(run(controls, pipe=pipe), before)


@pytest.mark.parametrize("what", ["hook", "forward"])
def test_what_is_done_to_a_part_is_not_skipped(what: str, pipe: Any) -> None:
    part = next(own for own in pipe.text_encoder.modules() if isinstance(own, nn.LayerNorm))
    with pipe.sharing():
        before = run(pipe=pipe)
        if what == "hook":
            part.register_forward_hook(lambda module, given, result: -result)
        else:
            plain = part.forward
            part.forward = lambda *given, **named: -plain(*given, **named)
        changed = run(pipe=pipe)
        assert distance(changed, before) > 1e-3
        look = counting(part)
        assert torch.equal(run(pipe=pipe), changed)
        look()
        assert torch.equal(run(pipe=pipe), changed)
        assert look() == 0, "it is asked once again, and not each time"


def test_weights_that_have_only_moved_are_the_same(pipe: Any) -> None:
    """As they do with diffusers' model offload, in each call."""
    look = counting(pipe.text_encoder)
    with pipe.sharing():
        first = run(pipe=pipe)
        look()
        for parameter in pipe.text_encoder.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(run(pipe=pipe), first)
        assert look() == 0


def test_weights_that_come_only_while_a_network_runs(pipe: Any) -> None:
    """accelerate's sequential offload, of which nobody outside sees the weights."""
    before = run(pipe=pipe)
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae):
        cpu_offload(part, torch.device("cpu"))
    assert next(pipe.text_encoder.parameters()).is_meta
    with pipe.sharing():
        assert distance(run(pipe=pipe), before) < 1e-4
        assert distance(run(pipe=pipe), before) < 1e-4


def test_the_last_answers_are_kept_up_to_a_size() -> None:
    ran: list[float] = []

    class Double:
        executed = ()

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(x[0].item())
            return 2 * x

    own = Double()
    ask = Remembered(Answers(limit=3 * 400)).network(own)
    for value in (1.0, 2.0, 3.0, 1.0, 4.0, 1.0, 2.0):
        assert torch.equal(ask(torch.full((100,), value)), torch.full((100,), 2 * value))
    assert ran == [1.0, 2.0, 3.0, 4.0, 2.0], "1 was asked again before 4 came, 2 was the oldest then"
