"""Pipelines over the same networks at once: in threads, and one inside another's loop."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import components, pipeline, unet
from diffusers.models.attention_processor import AttnProcessor2_0
from kandinsky_models import prior_components
from test_mixtures import run

from diffusion_kit import KandinskyV22PriorPipeline, SDXLPipeline
from diffusion_kit.models.attention import attention_layers, locked


def of_one_unet() -> tuple[Any, Any]:
    """Each with a scheduler of its own."""
    first, second = (pipeline(SDXLPipeline, scheduler=copy.deepcopy(components()["scheduler"])) for _ in range(2))
    assert first.unet is second.unet
    return first, second


def other(pipe: Any) -> torch.Tensor:
    return run(task="image", pipe=pipe, prompt="two blue boats")


def as_they_were() -> bool:
    return {type(layer.processor) for _, layer in attention_layers(unet())} == {AttnProcessor2_0}


def test_two_threads_make_the_pictures_that_each_makes_alone() -> None:
    first, second = of_one_unet()
    wanted, made = [run(pipe=first), other(second)], {}
    thread = Thread(target=lambda: made.update(other=other(second)))

    def begin(pipe: Any, k: int, *_: Any) -> dict[str, Any]:
        if k == 0:
            assert second.obstacle is None
            thread.start()
            thread.join(0.5)  # it gets as far as it can
        return {}

    found = run(pipe=first, callback_on_step_end=begin)
    thread.join(60)
    assert torch.equal(found, wanted[0])
    assert torch.equal(made["other"], wanted[1])
    assert as_they_were()


def test_a_picture_is_made_in_the_loop_of_another() -> None:
    first, second = of_one_unet()
    wanted, made = [run(pipe=first), other(second)], []

    def look(*_: Any) -> dict[str, Any]:
        made.append(other(second))
        return {}

    assert torch.equal(run(pipe=first, callback_on_step_end=look), wanted[0])
    assert all(torch.equal(own, wanted[1]) for own in made)
    assert as_they_were()


def test_a_prior_is_as_it_was_in_the_loop_of_another() -> None:
    """Its attention is told by a mask what it sees, which the executor's is not."""
    parts = prior_components()
    first, second = (
        KandinskyV22PriorPipeline(**{**parts, "scheduler": copy.deepcopy(parts["scheduler"])}) for _ in range(2)
    )
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)

    def embeds(pipe: Any, **more: Any) -> torch.Tensor:
        call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(1)}
        return pipe("a red fox", **call, **more).image_embeds

    wanted, made = embeds(first), []

    def look(*_: Any) -> dict[str, Any]:
        made.append(embeds(second))
        return {}

    assert torch.equal(embeds(first, callback_on_step_end=look), wanted)
    assert all(torch.equal(own, wanted) for own in made)
    assert len(made) == 3


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_a_network_that_another_thread_has_set_otherwise_is_waited_for(part: str) -> None:
    """Its LoRAs scaled, in float32 for a decoding, or with the executor's attention."""
    pipe, done = pipeline(SDXLPipeline), []
    thread = Thread(target=lambda: done.append(pipe("a fox", num_inference_steps=1, output_type="np")))
    with locked(getattr(pipe, part)):
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(60)
    assert done
