"""Captured steps, as far as a CPU can show: fixed buffers, fixed addresses, and nothing that a graph would not see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import components, distance, half_mask, lines, make_adapter, make_controlnet, picture, pipeline
from test_mixtures import KINDS, TASKS, run
from test_schedulers import make
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.sampling.engines import CudaGraphs
from diffusion_kit.sampling.engines.exported import leaves


class Tape(TorchDispatchMode):
    """Writes down what is computed and on which tensors, as a CUDA graph does: a replay computes the same again from what
    then lies in the same memory, and writes the results where the first ones were. Python runs no second time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, value in zip(leaves(out), leaves(again), strict=True):
                if kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)


class OnTape:
    """A stand-in for `OnCuda`, which counts its captures and replays and remembers the addresses that it writes to."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0
        self.addresses: list[list[int]] = []

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:
            outputs = function()
        self.captures += 1
        place = [value.data_ptr() for value in leaves(outputs)]

        def replay() -> None:
            tape.replay()
            self.replays += 1
            assert [value.data_ptr() for value in leaves(outputs)] == place

        return outputs, replay


def captured(**more: Any) -> Any:
    pipe = pipeline(SDXLPipeline, **more)
    pipe.engine = CudaGraphs(OnTape())
    return pipe


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "ddim", "ddpm", "dpm", "dpm_sde_karras", "unipc", "lcm"])
def test_replayed_steps_give_the_same_picture(name: str, task: str) -> None:
    controls = [Control(make_adapter(), lines(1), mask=half_mask()), Control(make_controlnet(), lines(2), scale=0.7)]
    pipes = [pipeline(SDXLPipeline, scheduler=make(name)), captured(scheduler=make(name))]
    plain, replayed = (run(controls, task, pipe) for pipe in pipes)
    assert torch.equal(replayed, plain)
    assert pipes[1].engine.capture.captures == 1
    assert pipes[1].engine.capture.replays >= 2


def test_other_prompts_scales_and_seeds_are_no_other_graph() -> None:
    plain, pipe = pipeline(SDXLPipeline), captured()
    for k, prompt in enumerate(["a red fox", "two blue boats"]):
        controls = [Control(make_adapter(), lines(k), scale=0.5 + k)]
        call = {"prompt": prompt, "generator": torch.Generator().manual_seed(k), "guidance_scale": 3.0 + k}
        again = {**call, "generator": torch.Generator().manual_seed(k)}
        assert torch.equal(run(controls, pipe=pipe, **call), run(controls, pipe=plain, **again))
    assert pipe.engine.capture.captures == 1


def test_a_window_is_two_graphs() -> None:
    controls = [Control(make_controlnet(), lines(2), end=0.5)]
    pipe = captured()
    for _ in range(2):
        assert torch.equal(run(controls, pipe=pipe), run(controls, pipe=pipeline(SDXLPipeline)))
    assert pipe.engine.capture.captures == 2


def test_callbacks_see_latents_that_the_next_step_leaves_alone() -> None:
    def kept(pipe: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def look(_: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return {}

        run(pipe=pipe, callback_on_step_end=look)
        return seen

    for a, b in zip(kept(captured()), kept(pipeline(SDXLPipeline)), strict=True):
        assert torch.equal(a, b)


def test_weights_are_read_where_they_lie() -> None:
    pipe = captured(unet=copy.deepcopy(components()["unet"]))
    first = run(pipe=pipe)
    pipe.unet.conv_out.weight.data.mul_(0.5)
    changed = run(pipe=pipe)
    assert pipe.engine.capture.captures == 1
    assert torch.equal(changed, run(pipe=pipeline(SDXLPipeline, unet=copy.deepcopy(pipe.unet))))
    assert distance(changed, first) > 1e-2
    pipe.unet.conv_out.weight = torch.nn.Parameter(2 * pipe.unet.conv_out.weight.detach())
    assert distance(run(pipe=pipe), first) < 1e-5
    assert pipe.engine.capture.captures == 2, "a weight lies elsewhere"


def test_the_engine_is_for_cuda() -> None:
    with pytest.raises(ValueError, match="cudagraph is for CUDA, the pipeline is on cpu"):
        pipeline(SDXLPipeline).optimize(engine="cudagraph")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_on_cuda(kind: str) -> None:
    pipes = [pipeline(SDXLPipeline, **copy.deepcopy(components())).to("cuda") for _ in range(2)]
    pipes[1].optimize(engine="cudagraph")
    call = {"image": picture(), "strength": 0.7}
    plain, replayed = (run([KINDS[kind]()], pipe=pipe, **call) for pipe in pipes)
    assert distance(replayed, plain) < 1e-4
