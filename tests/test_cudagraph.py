"""Captured steps, as far as a CPU can show: fixed buffers, fixed addresses, and nothing that a graph would not see."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    components,
    crossed,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_controlnet,
    make_vae,
    picture,
    pipeline,
)
from peft import LoraConfig
from test_mixtures import KINDS, TASKS, run
from test_schedulers import make
from test_step import Count
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.sampling.engines import CudaGraphs
from diffusion_kit.sampling.engines.cudagraph import OnCuda
from diffusion_kit.sampling.engines.exported import leaves
from diffusion_kit.sampling.engines.graphs import RUNS
from diffusion_kit.sampling.engines.recent import Recent
from diffusion_kit.sampling.engines.weights import content, state

VIEWS = {"aten.view", "aten.slice", "aten.select", "aten.unsqueeze", "aten.detach", "aten.alias", "aten.expand"}


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

    @torch.inference_mode()  # no version is counted
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, value in zip(leaves(out), leaves(again), strict=True):
                if kept.data_ptr() != value.data_ptr():
                    kept.copy_(value)


class OnTape:
    """A stand-in for `OnCuda`, which counts its captures and replays."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def __call__(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        with Tape() as tape:
            outputs = function()
        self.captures += 1

        def replay() -> None:
            tape.replay()
            self.replays += 1

        return outputs, replay


def captured(**more: Any) -> Any:
    pipe = pipeline(SDXLPipeline, **more)
    pipe.engine = CudaGraphs(OnTape())
    return pipe


@pytest.mark.parametrize(
    ("task", "name"),
    crossed(TASKS, ["euler", "euler_ancestral", "ddim", "ddpm", "dpm", "dpm_sde_karras", "unipc", "lcm"]),
)
def test_replayed_steps_give_the_same_picture(name: str, task: str) -> None:
    controls = [Control(make_adapter(), lines(1), mask=half_mask()), Control(make_controlnet(), lines(2), scale=0.7)]
    pipes = [pipeline(SDXLPipeline, scheduler=make(name)), captured(scheduler=make(name))]
    plain, replayed = (run(controls, task, pipe) for pipe in pipes)
    assert torch.equal(replayed, plain)
    assert pipes[1].engine.capture.captures == 1
    assert pipes[1].engine.capture.replays >= 2


def test_kept_features_are_replayed() -> None:
    controls = [Control(make_adapter(), lines(1), end=0.5), Control(make_controlnet(), lines(2))]
    pipes = [pipeline(SDXLPipeline), captured()]
    for pipe in pipes:
        pipe.cache_steps(2, guidance="reuse")
    plain, replayed = (run(controls, pipe=pipe, num_inference_steps=8) for pipe in pipes)
    assert torch.equal(replayed, plain)
    assert pipes[1].done["deep features reused"] == 4
    assert pipes[1].engine.capture.replays >= 2


def test_networks_that_are_used_no_more_are_let_go() -> None:
    """A service that loads another ControlNet for each picture must not keep them all."""
    pipe = captured()
    gone = make_controlnet()
    run([Control(gone, lines(2))], pipe=pipe)
    graphs = len(pipe.engine.graphs)
    watched = weakref.ref(gone)
    del gone
    for _ in range(RUNS):
        run(pipe=pipe)
    gc.collect()
    assert watched() is None
    assert len(pipe.engine.graphs) == 1 < graphs + 1


def test_captures_are_on_a_stream_and_in_a_pool_of_their_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    card = [0]

    class Stream:
        def __init__(self) -> None:
            self.card = card[0]

        def wait_stream(self, other: Any) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            pass

    def graph(_: Any, **given: Any) -> Any:
        used.append((card[0], given["stream"], given["pool"]))
        return nullcontext()

    stand_ins = {"Stream": Stream, "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": object}
    stand_ins |= {"current_stream": Stream, "stream": lambda own: nullcontext(), "current_device": lambda: card[0]}
    for name, own in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, own)
    capture = OnCuda()
    for card[0] in (0, 1, 0):
        assert capture(lambda: 5, torch.device("cuda", card[0]))[0] == 5
    assert all(number == stream.card for number, stream, _ in used)
    assert used[0] == used[2] != used[1]
    assert used[0][2] is not used[1][2]


def test_a_pipeline_that_was_moved_to_a_cpu_runs_as_it_is_and_says_so() -> None:
    """A graph captured there would be empty: every step would give the first one's result."""
    pipe = pipeline(SDXLPipeline)
    pipe.engine = CudaGraphs()
    assert torch.equal(run(pipe=pipe), run(pipe=pipeline(SDXLPipeline)))
    assert pipe.engine.notes == ["a step runs as it is, cudagraph cannot: it is for CUDA, the step is on cpu"]


def test_a_graph_made_in_inference_mode_serves_outside_of_it() -> None:
    pipe = captured()
    with torch.inference_mode():
        run(pipe=pipe)
    plain = run(pipe=pipeline(SDXLPipeline), prompt="two blue boats")
    assert torch.equal(run(pipe=pipe, prompt="two blue boats"), plain)
    assert pipe.engine.capture.captures == 1


def test_a_copy_of_a_pipeline_has_no_graphs_of_the_first() -> None:
    pipe = captured(unet=copy.deepcopy(components()["unet"]))
    before = run(pipe=pipe)
    other = copy.deepcopy(pipe)
    other.unet.conv_out.weight.data = 2 * other.unet.conv_out.weight
    plain = pipeline(SDXLPipeline, unet=copy.deepcopy(other.unet))
    assert torch.equal(run(pipe=other), run(pipe=plain))
    assert torch.equal(run(pipe=pipe), before)
    assert pipe.engine.capture.captures == 1


def test_a_replayed_step_dispatches_copies_alone() -> None:
    """Of what has changed into the graph's buffers, and of what it wrote: nothing is computed or made beside it."""
    pipe = pipeline(SDXLPipeline)
    pipe.engine = CudaGraphs(lambda function, _: (function(), lambda: None))
    controls = [Control(make_adapter(), lines(1), mask=half_mask()), Control(make_controlnet(), lines(2), scale=0.7)]
    with Count() as count:

        def mark(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
            count.mark()
            return {}

        run(controls, pipe=pipe, num_inference_steps=5, callback_on_step_end=mark)
    for operations in count.steps:
        assert set(operations) <= {"aten.copy_", "aten.clone", *VIEWS}
        assert operations.count("aten.clone") == 2, "the state and the prediction"
        assert len(operations) < 30


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


CHANGES: dict[str, tuple[Any, Any]] = {  # what is set on the UNet, and how a call changes it
    "lora": (
        lambda unet: unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"])),
        lambda pipe: run(pipe=pipe, cross_attention_kwargs={"scale": 0.3}),
    ),
    "free u": (
        lambda unet: None,
        lambda pipe: (pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2), run(pipe=pipe))[1],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_that_are_set_on_modules_are_another_graph(change: str) -> None:
    """A graph has them as constants."""
    prepare, changed = CHANGES[change]
    unet = copy.deepcopy(components()["unet"])
    torch.manual_seed(0)
    prepare(unet)
    plain, pipe = pipeline(SDXLPipeline, unet=copy.deepcopy(unet)), captured(unet=unet)
    first, kept = run(pipe=pipe), (state([unet]), content([unet]))
    other = changed(pipe)
    assert torch.equal(other, changed(plain))
    assert distance(other, first) > 1e-2
    assert pipe.engine.capture.captures == 2
    if change == "free u":
        assert kept[0] != state([unet])
        assert kept[1] != content([unet])
    else:
        assert torch.equal(run(pipe=pipe), first)
        assert torch.equal(changed(pipe), other)
        assert pipe.engine.capture.captures == 2, "both graphs are kept"


def test_a_network_with_a_forward_of_its_own_is_not_captured() -> None:
    pipe = captured(unet=copy.deepcopy(components()["unet"]))
    pipe.unet.forward = partial(pipe.unet.forward)
    first = run(pipe=pipe)
    pipe.unet.conv_out.weight = torch.nn.Parameter(0.5 * pipe.unet.conv_out.weight.detach())
    assert distance(run(pipe=pipe), first) > 1e-2
    assert pipe.engine.capture.captures == 0
    assert "own forward as they are" in pipe.engine.notes[0]


def test_what_cannot_be_captured_runs_as_it_is_and_says_so() -> None:
    def refuse(function: Any, device: Any) -> Any:
        raise RuntimeError("out of memory")

    pipe = pipeline(SDXLPipeline)
    plain = run(pipe=pipe)
    pipe.engine = CudaGraphs(refuse)
    assert torch.equal(run(pipe=pipe), plain)
    assert pipe.engine.notes == ["a step runs as it is, cudagraph cannot: out of memory"]


def test_the_last_graphs_are_kept() -> None:
    recent: Recent[int] = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent.get(key, lambda key=key: ord(key))
    assert list(recent.values) == ["a", "c"]


def test_what_is_said_is_what_runs() -> None:
    told = captured().explain()
    for name, executor in (("unet", "cudagraph"), ("text_encoder", "eager"), ("vae", "eager")):
        assert f"{name} by {executor}: " in told


@pytest.mark.parametrize("part", ["mid_block", "conv_out"])
def test_a_hook_on_a_part_is_heard(part: str) -> None:
    pipe = captured(**copy.deepcopy(components()))
    before = run(pipe=pipe)
    handle = pipe.unet.get_submodule(part).register_forward_hook(lambda *given: 0.5 * given[-1])
    assert torch.equal(run(pipe=pipe), run(pipe=pipeline(SDXLPipeline, **pipe.components)))
    assert distance(run(pipe=pipe), before) > 1e-3
    assert pipe.engine.notes == ["a step runs as it is, cudagraph cannot: a part of it has hooks"]
    handle.remove()
    assert torch.equal(run(pipe=pipe), before)
    assert pipe.engine.capture.captures == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/verify cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_on_cuda(kind: str) -> None:
    parts = {**components(), "vae": make_vae(4)}
    pipes = [pipeline(SDXLPipeline, **copy.deepcopy(parts)).to("cuda") for _ in range(2)]
    pipes[1].optimize(engine="cudagraph")
    call = {"image": picture(), "strength": 0.7}
    plain, replayed = (run([KINDS[kind]()], pipe=pipe, **call) for pipe in pipes)
    assert distance(replayed, plain) < 1e-4
