"""Who runs a case: diffusers, the kit's levels and engines, and other runtimes with a loop of their own."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .models import inputs


class Run(NamedTuple):
    """A run's latents (B, 4, h, w), and when each of its steps ended; a card goes on while Python is ahead, so there is no
    such time there."""

    latents: Tensor
    ends: list[float]


Runner = Callable[[], Run]
GUIDANCE, SEED = 5.0, 0


class Absent(RuntimeError):
    """Why a contender is not of a case; any other error is one that it has in it."""


def peer(case: Case, folder: Path, *, compiled: bool = False) -> Runner:
    """diffusers, as it is or with its UNet and ControlNet through torch.compile."""
    import diffusers

    names = {
        (): "StableDiffusionXLPipeline",
        ("t2i_adapter",): "StableDiffusionXLAdapterPipeline",
        ("controlnet",): "StableDiffusionXLControlNetPipeline",
    }
    if case.controls not in names:
        raise Absent("diffusers has no pipeline with both")
    dtype = getattr(torch, case.dtype)
    nets = load_controls(case, folder)
    given = {"adapter" if name == "t2i_adapter" else name: net for name, net in nets.items()}
    options: dict[str, Any] = {"torch_dtype": dtype, "add_watermarker": False, **given}
    pipe = getattr(diffusers, names[case.controls]).from_pretrained(folder, **options).to(case.device)
    if compiled:
        pipe.unet = torch.compile(pipe.unet)
        if "controlnet" in nets:
            pipe.controlnet = torch.compile(pipe.controlnet)
    own = inputs(case)
    picture, call = own.pop("picture"), arguments(case)
    if "t2i_adapter" in nets:
        call |= {"image": picture.to(case.device, dtype), "adapter_conditioning_factor": case.end}
    if "controlnet" in nets:
        call |= {"image": picture.to(case.device, dtype), "control_guidance_end": case.end}
    return running(pipe, case, {**own, **call})


def kit(case: Case, folder: Path, *, level: str = "exact", engine: str = "eager") -> Runner:
    from diffusion_kit import Control, SDXLPipeline

    dtype = getattr(torch, case.dtype)
    pipe = SDXLPipeline.from_pretrained(folder, torch_dtype=dtype, add_watermarker=False).to(case.device)
    nets = load_controls(case, folder)
    pipe.optimize(level, engine=engine)
    if pipe.engine.name != engine:
        raise Absent("; ".join(pipe.notes))
    own = inputs(case)
    picture = own.pop("picture")
    controls = [Control(net, picture, end=case.end) for net in nets.values()]
    run = running(pipe, case, {**own, **arguments(case), "controls": controls})

    def checked() -> Run:
        done = run()
        if any(" runs as it is" in note for note in pipe.engine.notes):
            raise RuntimeError("; ".join(pipe.engine.notes))
        return done

    return checked


def load_controls(case: Case, folder: Path) -> dict[str, Any]:
    from diffusers import ControlNetModel, T2IAdapter

    classes = {"t2i_adapter": T2IAdapter, "controlnet": ControlNetModel}
    dtype = getattr(torch, case.dtype)
    nets = {name: classes[name].from_pretrained(folder / "more" / name, torch_dtype=dtype) for name in case.controls}
    return {name: net.to(case.device) for name, net in nets.items()}


def arguments(case: Case) -> dict[str, Any]:
    side = 8 * case.side
    return {
        "height": side,
        "width": side,
        "num_inference_steps": case.steps,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
    }


def running(pipe: Any, case: Case, call: dict[str, Any]) -> Runner:
    pipe.set_progress_bar_config(disable=True)
    # diffusers' pipeline of T2I-Adapters has the older one, which is called in every step with other arguments.
    names = ("callback_on_step_end", "callback")
    told = next(name for name in names if name in inspect.signature(type(pipe).__call__).parameters)

    def run() -> Run:
        ends: list[float] = []

        def note(*given: Any) -> Any:
            ends.append(time.perf_counter())
            return given[-1]

        watched = {told: note} if case.device == "cpu" else {}
        latents = pipe(generator=torch.Generator().manual_seed(SEED), **call, **watched).images.float().cpu()
        return Run(latents, ends)

    return run


# Other runtimes: the UNet alone, with diffusers' scheduler in a plain loop


class Plain(torch.nn.Module):
    """The UNet of a folder as a function of tensors."""

    def __init__(self, folder: Path) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()

    def forward(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}
        return self.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


Compiler = Callable[[Callable[[], Plain], tuple[Tensor, ...], Case], Callable[..., Tensor]]


def scratch() -> Path:
    """Where a contender's next process finds what it has converted: the kit's own cache."""
    folder = Path(os.environ["DIFFUSION_KIT_CACHE"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runtime(case: Case, folder: Path, compiled: Compiler) -> Runner:
    """A UNet that another runtime runs, in the loop that its users write."""
    from diffusers import EulerDiscreteScheduler

    if case.controls:
        raise Absent("the UNet alone, without controls")
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    own = {name: value.float() for name, value in inputs(case).items()}
    states = torch.cat([own["negative_prompt_embeds"], own["prompt_embeds"]])
    pooled = torch.cat([own["negative_pooled_prompt_embeds"], own["pooled_prompt_embeds"]])
    side = 8 * case.side
    ids = torch.tensor([[side, side, 0, 0, side, side]]).float().expand(2 * case.batch, -1)
    start = torch.randn(case.batch, 4, case.side, case.side, generator=torch.Generator().manual_seed(SEED))
    example = (torch.cat([start, start]), torch.tensor(1.0), states, pooled, ids)
    network = compiled(partial(Plain, folder), example, case)

    @torch.no_grad()
    def run() -> Run:
        scheduler.set_timesteps(case.steps)
        x, ends = start * scheduler.init_noise_sigma, []
        for t in scheduler.timesteps:
            both = network(scheduler.scale_model_input(torch.cat([x, x]), t), t, states, pooled, ids)
            without, given = both.chunk(2)
            x = scheduler.step(without + GUIDANCE * (given - without), t, x, return_dict=False)[0]
            ends.append(time.perf_counter())
        return Run(x, ends)

    return run


def openvino_network(make: Callable[[], Plain], example: tuple[Tensor, ...], case: Case) -> Callable[..., Tensor]:
    """Converted and compiled as its guide says, in the precision of the case."""
    import openvino

    file = scratch() / "alone.xml"
    if not file.is_file():
        with torch.no_grad():
            model = openvino.convert_model(torch.export.export(make(), example))
        openvino.save_model(model, file, compress_to_fp16=False)
        del model
    hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[case.dtype]
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": case.threads}
    compiled = openvino.Core().compile_model(file, "CPU", options)

    def run(*given: Tensor) -> Tensor:
        return torch.from_numpy(compiled([value.numpy() for value in given], share_inputs=True)[0])

    return run


def onnx_network(make: Callable[[], Plain], example: tuple[Tensor, ...], case: Case) -> Callable[..., Tensor]:
    import onnxruntime

    if case.dtype != "float32":
        raise Absent("its CPU runs float32")
    file = scratch() / "alone.onnx"
    names = [f"input_{k}" for k in range(len(example))]
    if not file.is_file():
        with torch.no_grad():
            torch.onnx.export(make(), example, file, input_names=names, dynamo=True, external_data=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> Tensor:
        return torch.from_numpy(
            session.run(None, {name: own.numpy() for name, own in zip(names, given, strict=True)})[0]
        )

    return run


Contender = Callable[[Case, Path], Runner]
ENGINES = ("eager", "packed", "openvino", "cudagraph", "inductor", "aoti")
CONTENDERS: dict[str, Contender] = {
    "diffusers": peer,
    "diffusers compiled": partial(peer, compiled=True),
    "openvino alone": partial(runtime, compiled=openvino_network),
    "onnxruntime alone": partial(runtime, compiled=onnx_network),
    **{
        f"{level} {engine}": partial(kit, level=level, engine=engine)
        for level in ("exact", "half", "fast")
        for engine in ENGINES
    },
}
SLOW = ("compiled", "inductor", "aoti")  # how names end of those that compile for minutes
CONVERTING = (" alone", " openvino", " aoti")  # and of those that keep on disk what they made of networks
NEEDS = {"openvino": "openvino", "onnxruntime": "onnxruntime"}  # a word of a contender's name: the package it needs


def names_on(device: str) -> list[str]:
    """Contenders that there are on such a device."""
    own = (" alone", " packed", " openvino") if device != "cpu" else (" cudagraph",)
    return [name for name in CONTENDERS if not name.endswith(own)]


def absent(name: str, case: Case) -> str | None:
    """Why a contender cannot run a case here, as far as that is known beforehand."""
    import importlib.util

    from diffusion_kit.pipelines.optimize import NO_HALF, half_of

    half = name.split()[0] in ("half", "fast")
    if half == (case.dtype == "float32") and name.split()[0] in ("exact", "half", "fast"):
        return f"{name} is not of {case.dtype}"
    if name not in names_on(case.device):
        return f"it is not for {case.device}"
    if case.device == "cpu" and case.dtype != "float32" and half_of(torch.device("cpu")) == torch.float32:
        return NO_HALF
    for word, package in NEEDS.items():
        if word in name and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None
