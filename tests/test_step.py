"""One step as one function of tensors: counted by dispatch, run on fake CUDA tensors, compiled into one graph."""

from __future__ import annotations

import copy
import dataclasses
from itertools import cycle, product
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    CROSS,
    components,
    half_mask,
    light,
    lines,
    make_adapter,
    make_controlnet,
    make_unet,
    picture,
    pipeline,
    randomise,
    seeds,
)
from test_schedulers import ALL, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.models import unet as executor
from diffusion_kit.models.attention import installed
from diffusion_kit.sampling.engines import Compiled, Engine
from diffusion_kit.sampling.engines.exported import Flat, filled, leaves

SYNCS = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}
CREATIONS = {"aten.scalar_tensor", "aten.lift_fresh", "aten.arange", "aten.full", "aten.tensor"}
STEPS = 5
TASKS = ("text", "image", "inpaint")
SAMPLERS = ["euler", "euler_ancestral", "ddim_clip", "ddpm_clip", "dpm", "dpm_sde_karras", "unipc", "lcm", "heun"]


class Count(TorchDispatchMode):
    """Operations that reach the device, host reads and tensors made, between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.marks: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))

    def mark(self) -> None:
        self.marks.append(len(self.names))

    @property
    def steps(self) -> list[list[str]]:
        """Operations of each step but the first, which makes what is kept."""
        return [self.names[a:b] for a, b in zip(self.marks, self.marks[1:], strict=False)]


def counted(cls: Any, call: dict[str, Any], parts: dict[str, Any]) -> Count:
    pipe = pipeline(cls, **parts)
    with Count() as count:

        def mark(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
            count.mark()
            return {}

        prompt = {"prompt": "a red fox", "generator": seeds(1), "num_inference_steps": STEPS}
        pipe(**prompt, **call, callback_on_step_end=mark, output_type="latent")
    return count


def controls() -> list[Control]:
    return [Control(make_adapter(), lines(1), mask=half_mask()), Control(make_controlnet(), lines(2), scale=0.7)]


@pytest.mark.parametrize(("task", "name"), light(product(TASKS, ALL), *zip(cycle(TASKS), SAMPLERS, strict=False)))
def test_no_host_read_and_no_new_tensor_in_a_step(name: str, task: str) -> None:
    call: dict[str, Any] = {"controls": controls()}
    if task != "text":
        call |= {"image": picture(), "strength": 0.9, "mask_image": half_mask() if task == "inpaint" else None}
    steps = counted(SDXLPipeline, call, {"scheduler": make(name)}).steps
    assert len(steps) >= 3
    for operations in steps:
        assert not SYNCS & set(operations)
        assert not CREATIONS & set(operations)
        assert not [name for name in operations if "rand" in name]
        assert len(operations) == len(steps[0])


@pytest.mark.parametrize("kind", ["plain", "controlnet"])
def test_fewer_operations_than_the_peer(kind: str) -> None:
    parts = {"controlnet": make_controlnet()} if kind == "controlnet" else {}
    name = "StableDiffusionXLControlNetPipeline" if kind == "controlnet" else "StableDiffusionXLPipeline"
    call = {"image": lines()} if kind == "controlnet" else {}
    import diffusion_kit

    ours, theirs = (len(counted(getattr(m, name), call, parts).steps[1]) for m in (diffusion_kit, diffusers))
    print(f"{kind}: {ours} operations a step, peer {theirs}: {1 - ours / theirs:.1%} fewer")
    assert ours <= 0.85 * theirs


def captured(pipe: Any, **call: Any) -> tuple[Any, Any, Any]:
    """The first step of a run, with its state and tensors, as the engine is given them."""
    taken: list[Any] = []

    class Taking(Engine):
        def __call__(self, step: Any, state: torch.Tensor, tensors: Any) -> Any:
            taken.append((step, state, tensors))
            return step

    pipe.engine = Taking()
    pipe(**{"generator": seeds(1), "num_inference_steps": STEPS, "output_type": "latent", **call})
    return taken[0]


@pytest.mark.parametrize(
    ("name", "task"),
    light(
        product(SAMPLERS, ["text", "image", "inpaint"]), ("euler", "text"), ("ddpm_clip", "image"), ("heun", "inpaint")
    ),
)
def test_all_that_a_step_is_given_lies_where_the_networks_do(name: str, task: str, monkeypatch: Any) -> None:
    """On a device without numbers, where whoever reads one on the host fails: before the first step, too."""
    monkeypatch.setattr(executor, "absent", lambda weight: None)  # weights without numbers are no networks elsewhere
    looked: list[Any] = []

    class Looking(Engine):
        def __call__(self, step: Any, state: torch.Tensor, tensors: Any) -> Any:
            looked.append([*leaves(tensors), state])
            return step

    pipe = pipeline(SDXLPipeline, **copy.deepcopy({**components(), "scheduler": make(name)})).to("meta")
    pipe.engine = Looking()
    states, pooled = torch.zeros(1, 77, CROSS, device="meta"), torch.zeros(1, 32, device="meta")
    call: dict[str, Any] = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    call |= {f"negative_{name}": value for name, value in call.items()}
    if task != "text":
        call |= {"image": picture(), "strength": 0.7, "mask_image": half_mask() if task == "inpaint" else None}
    given = [dataclasses.replace(control, model=copy.deepcopy(control.model).to("meta")) for control in controls()]
    pipe(**call, controls=given, generator=seeds(1), num_inference_steps=STEPS, output_type="latent")
    assert len(looked) >= 3
    assert {value.device.type for values in looked for value in values} == {"meta"}


def runs_on_fake_cuda(step: Any, state: torch.Tensor, tensors: Any) -> None:
    """Runs a step on CUDA tensors without numbers: a host read or a CPU tensor inside it raises."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    nets: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    def on_cuda(part: Any) -> Any:
        """A denoiser or an injection over a copy of its network."""
        if not hasattr(part, "net"):
            return part
        if id(part.net) not in nets:
            nets[id(part.net)] = copy.deepcopy(part.net)
            for module in nets[id(part.net)].modules():
                for holder in (module._parameters, module._buffers):
                    for key, value in holder.items():
                        moved = fake(value)
                        is_weight = holder is module._parameters and moved is not None
                        holder[key] = torch.nn.Parameter(moved, False) if is_weight else moved
        return dataclasses.replace(part, net=nets[id(part.net)])

    injections = tuple(on_cuda(injection) for injection in step.injections)
    moved_step = dataclasses.replace(step, denoiser=on_cuda(step.denoiser), injections=injections)
    inputs = (fake(state), fake(torch.tensor([1])), tree_map(fake, tensors))
    with mode, installed(*nets.values()):
        after, prediction, *_ = moved_step(*inputs)
    assert after.device.type == prediction.device.type == "cuda"
    assert after.shape == state.shape


@pytest.mark.parametrize(
    ("name", "task"),
    light(
        product([*SAMPLERS, "pndm"], TASKS), ("euler", "text"), ("ddpm_clip", "image"), ("dpm_sde_karras", "inpaint")
    ),
)
def test_a_step_on_fake_cuda_tensors(name: str, task: str) -> None:
    call = {
        "text": {},
        "image": {"image": picture(), "strength": 0.7},
        "inpaint": {"image": picture(), "mask_image": half_mask()},
    }
    pipe = pipeline(SDXLPipeline, scheduler=make(name))
    runs_on_fake_cuda(*captured(pipe, prompt="a red fox", controls=controls(), **call[task]))


def small() -> tuple[list[Control], Any]:
    """A UNet of two levels with an adapter and a ControlNet for it: compiling takes seconds."""
    net = make_unet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=2,
    )
    controlnet = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 16, 16))
    adapter = make_adapter(channels=(16, 32))
    return [Control(adapter, lines(1), mask=half_mask()), Control(randomise(controlnet, 4), lines(2), scale=0.7)], net


class Backend:
    """Counts graphs; runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.heavy
def test_one_graph_for_each_signature() -> None:
    backend = Backend()
    own, net = small()
    pipe, plain = pipeline(SDXLPipeline, unet=net), pipeline(SDXLPipeline, unet=net)
    pipe.engine = Compiled(backend=backend)

    def run(which: Any, prompt: str, controls: list[Control], **more: Any) -> torch.Tensor:
        call = {"generator": seeds(1), "num_inference_steps": 4, "output_type": "latent"}
        return which(prompt, controls=controls, **call, **more).images

    first = run(pipe, "a red fox", own)
    assert backend.graphs == 1
    torch.testing.assert_close(first, run(plain, "a red fox", own))
    run(pipe, "another prompt, longer than before", own, guidance_scale=7.0)
    others = [
        Control(own[0].model, lines(5), scale=0.3, mask=half_mask()),
        Control(own[1].model, lines(6), scale=[0.1, 0.2, 0.3]),
    ]
    run(pipe, "a red fox", others)
    assert backend.graphs == 1, "prompt and scale are tensors"
    run(pipe, "a red fox", [own[0], Control(own[1].model, lines(2), end=0.5)])
    assert backend.graphs == 2, "a window is a second set of active controls"
    run(pipe, "a red fox", [own[0], Control(own[1].model, lines(2), start=0.25, end=0.75)])
    run(pipe, "a red fox", [own[0]])
    assert backend.graphs == 2
    run(pipe, "a red fox", own, guidance_interval=(0.0, 0.5))
    assert backend.graphs == 3, "a step without guidance"
    run(pipe, "a red fox", own, width=96)
    assert backend.graphs == 4, "another shape"
    run(pipe, "a red fox", own)
    assert backend.graphs == 4
    assert not pipe.engine.notes


@pytest.mark.parametrize("name", light(["euler_ancestral", "ddim_clip", "unipc"], "euler_ancestral"))
def test_a_whole_step_compiles_without_a_break(name: str) -> None:
    """aot_eager: forward graphs of the whole step, with inpainting's rule and every control."""
    own, net = small()
    call = {
        "image": picture(),
        "mask_image": half_mask(),
        "controls": own,
        "guidance_rescale": 0.5,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    pipe, plain = (pipeline(SDXLPipeline, unet=net, scheduler=make(name)) for _ in range(2))
    pipe.engine = Compiled(backend="aot_eager")
    results = [p("a red fox", generator=seeds(1), **call).images for p in (pipe, plain)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(pipe.engine.graphs) == 1
    assert not pipe.engine.notes


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so() -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    _, net = small()
    pipe = pipeline(SDXLPipeline, unet=net)
    call = {"prompt": "a red fox", "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(**call, generator=seeds(1)).images
    pipe.engine = Compiled(backend=broken)
    assert torch.equal(pipe(**call, generator=seeds(1)).images, plain)
    assert len(pipe.engine.notes) == 1
    assert "a step runs as it is, inductor cannot: " in pipe.engine.notes[0]
    assert "\n" not in pipe.engine.notes[0]


class Exporting(Engine):
    """Exports the first step, and runs every step through what was exported."""

    def __init__(self) -> None:
        super().__init__()
        self.program: Any = None

    def __call__(self, step: Any, state: torch.Tensor, tensors: Any) -> Any:
        def run(*inputs: Any) -> Any:
            if self.program is None:
                program = torch.export.export(Flat(step, inputs), tuple(leaves(inputs)))
                self.program = program.module(), step(*inputs)
            exported, like = self.program
            return filled(like, exported(*leaves(inputs)))

        return run


@pytest.mark.parametrize("name", light(["euler_ancestral", "ddim_clip"], "ddim_clip"))
def test_a_whole_step_is_exported(name: str) -> None:
    """With inpainting's rule and every control; coefficients are tables, so one program is right in every step."""
    own, net = small()
    call = {"image": picture(), "mask_image": half_mask(), "controls": own, "output_type": "latent"}
    pipe, plain = (pipeline(SDXLPipeline, unet=net, scheduler=make(name)) for _ in range(2))
    pipe.engine = Exporting()
    results = [p("a red fox", generator=seeds(1), num_inference_steps=4, **call).images for p in (pipe, plain)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/verify cuda")
def test_no_synchronisation_on_cuda() -> None:
    """`torch.cuda.set_sync_debug_mode` raises on any synchronisation inside the loop's steps."""
    pipe = pipeline(SDXLPipeline).to("cuda")
    own = controls()

    def watch(pipe: Any, k: int, t: Any, tensors: Any) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("error" if k < STEPS - 2 else "default")
        return {}

    try:
        pipe("a red fox", controls=own, num_inference_steps=STEPS, callback_on_step_end=watch, output_type="latent")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        pipe.to("cpu")
