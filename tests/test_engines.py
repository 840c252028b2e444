"""Engines: the same picture whoever executes the networks, nothing stale, and one line where something cannot be."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import CROSS, components, distance, make_sd_unet, make_vae, needs, picture, pipeline, seeds
from diffusers.models.attention_processor import AttnProcessor2_0
from kandinsky_models import kandinsky3_components, movq
from safetensors.torch import load_file, save_model
from test_kandinsky import build
from test_loaders import save_lora
from test_mixtures import KINDS, TASKS, run
from test_step import small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusion_kit
from diffusion_kit import AutoPipelineForText2Image, Kandinsky3Pipeline, SDXLPipeline
from diffusion_kit.models import onednn
from diffusion_kit.models.attention import changed
from diffusion_kit.models.vae import decode_latents, encode_mode, encode_picture
from diffusion_kit.pipelines import base, engines
from diffusion_kit.pipelines.optimize import FAST, half_of
from diffusion_kit.sampling.cache import StepCache
from diffusion_kit.sampling.engines import Compiled, Engine, aoti, converting, eager
from diffusion_kit.sampling.engines.files import whole_folder
from diffusion_kit.sampling.engines.weights import content, is_parked, meddled, park, sampled, state

SAME = 1e-5
HALF = {
    "half": 0.06,  # 3-4 % on processors that compute in bfloat16, which round more often than torch where it imitates it
    "fast": 0.5,
}  # of latents of a UNet with random weights, whose features do not go on as trained ones'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of converted networks: many tests run the same."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline with a UNet of two levels, whose networks OpenVINO runs."""
    needs("openvino")
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(folder))

    def make(**more: Any) -> Any:
        pipe = pipeline(SDXLPipeline, **copy.deepcopy({**components(), **more}))
        pipe.optimize(engine="openvino")
        return pipe

    return make


@pytest.fixture(scope="module")
def shallow() -> dict[str, Any]:
    """A UNet of two levels, and what is as it is: converted in seconds."""
    return {**components(), "unet": small()[1]}


def made(pipe: Any) -> list[str]:
    return sorted(type(key[0]).__name__ for key in pipe.engine.made)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_with_every_control(kind: str, converted: Any) -> None:
    pipe = converted(vae=make_vae(4))
    assert distance(run([KINDS[kind]()], pipe=pipe), run([KINDS[kind]()])) < SAME
    assert not pipe.engine.notes
    assert "UNetDenoiser" in made(pipe)
    assert "engine     openvino" in pipe.explain()


@pytest.mark.heavy
def test_the_same_pixels(converted: Any, shallow: dict[str, Any]) -> None:
    """Text encoders and both halves of the autoencoder are converted, too."""
    call = {"prompt": "a red fox", "image": picture(1), "num_inference_steps": 4, "output_type": "pt"}
    pipes = pipeline(SDXLPipeline, **shallow), converted(**shallow)
    plain, other = (pipe(**call, generator=torch.Generator().manual_seed(0)).images for pipe in pipes)
    assert (other - plain).abs().max() < 1e-4
    assert made(pipes[1]) == ["Decoder", "Encoder", "TextEncoder", "TextEncoder", "UNetDenoiser"]
    assert not pipes[1].engine.notes


@pytest.mark.heavy
def test_windows_and_numbers_of_steps_make_no_other_network(converted: Any) -> None:
    (adapter, net), unet = small()
    controls = [replace(adapter, end=0.5), replace(net, start=0.5)]
    pipe = converted(unet=unet)
    for steps in (4, 6):
        plain = run(controls, pipe=pipeline(SDXLPipeline, unet=unet), num_inference_steps=steps)
        assert distance(run(controls, pipe=pipe, num_inference_steps=steps), plain) < SAME
        assert [name for name in made(pipe) if name != "TextEncoder"] == ["RunControlNet", "UNetDenoiser"]


@pytest.mark.heavy
def test_the_same_picture_with_kept_features(converted: Any) -> None:
    """What a step cache keeps comes out of one converted network and goes into another."""
    (adapter, net), unet = small()
    controls = [replace(adapter, end=0.5), net]
    pipes = [pipeline(SDXLPipeline, unet=unet), converted(unet=unet)]
    for pipe in pipes:
        pipe.cache_steps(2, guidance="reuse")
    plain, own = (run(controls, pipe=pipe, num_inference_steps=6) for pipe in pipes)
    assert distance(own, plain) < SAME
    assert pipes[1].done == pipes[0].done
    assert pipes[1].done["deep features reused"] == 2, "where the window ends there is a full step"
    assert not pipes[1].engine.notes


def test_a_network_is_converted_once(converted: Any, shallow: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    states, pooled = torch.randn(1, 77, CROSS), torch.randn(1, 32)  # text encoders have the heavy test of their own
    call = {"prompt": None, "prompt_embeds": states, "pooled_prompt_embeds": pooled}
    call |= {f"negative_{name}": -value for name, value in call.items() if value is not None}
    first = run(pipe=converted(**shallow), **call)
    assert distance(first, run(pipe=pipeline(SDXLPipeline, **shallow), **call)) < SAME

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(torch.export, "export", again)
    pipe = converted(**shallow)
    assert torch.equal(run(pipe=pipe, **call), first)
    assert not pipe.engine.notes


@pytest.mark.heavy
def test_a_lora_after_optimize_acts_and_goes(converted: Any, shallow: dict[str, Any], tmp_path: Path) -> None:
    save_lora(tmp_path, "a", 1, shallow["unet"])
    pipes = [pipeline(SDXLPipeline, **copy.deepcopy(shallow)), converted(**shallow)]
    results = []
    for pipe in pipes:
        before = run(pipe=pipe)
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
        loaded = run(pipe=pipe)
        weak = run(pipe=pipe, cross_attention_kwargs={"scale": 0.5})
        pipe.set_adapters("a", 2.0)
        strong = run(pipe=pipe)
        pipe.fuse_lora(lora_scale=0.6)
        fused = run(pipe=pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        results.append([before, loaded, weak, strong, fused, run(pipe=pipe)])
        pipe.unet.to(torch.float16).to(torch.float32)
        results[-1].append(run(pipe=pipe))
    for a, b in zip(*results, strict=True):
        assert distance(b, a) < SAME
    assert distance(results[0][1], results[0][0]) > 1e-2 < distance(results[0][2], results[0][1])
    assert distance(results[0][3], results[0][1]) > 1e-2 < distance(results[0][4], results[0][3])
    assert not torch.equal(results[0][6], results[0][5]), "rounded weights"
    assert not pipes[1].engine.notes


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["aoti", "inductor", "packed", "openvino"])
def test_every_engine_gives_the_same_picture_in_every_task(engine: str, folder: Path, monkeypatch: Any) -> None:
    """With an adapter, and a ControlNet in half of the steps."""
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(folder))
    (adapter, net), unet = small()
    controls = [replace(adapter, mask=None), replace(net, end=0.5)]
    pipes = [pipeline(SDXLPipeline, unet=copy.deepcopy(unet)) for _ in range(2)]
    if engine == "openvino":
        needs("openvino")
    pipes[1].optimize(engine=engine)
    assert pipes[1].engine.name == engine
    for task in TASKS:
        plain, own = (run(controls, task, pipe) for pipe in pipes)
        assert distance(own, plain) < SAME
    assert not pipes[1].engine.notes


EDITS: dict[str, Any] = {
    "in place": lambda net: net.conv_out.weight.mul_(1.5),
    "unseen": lambda net: net.conv_out.weight.data.mul_(1.5),
    "another": lambda net: setattr(net.conv_out, "weight", nn.Parameter(1.5 * net.conv_out.weight.detach())),
    "loaded": lambda net: net.load_state_dict({k: 1.1 * v for k, v in net.state_dict().items()}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_change_of_weights_is_seen(edit: str) -> None:
    net = copy.deepcopy(components()["unet"])
    before = state([net]), sampled([net]), content([net])
    assert (state([net]), sampled([net]), content([net])) == before
    with torch.no_grad():
        EDITS[edit](net)
    assert (state([net]) != before[0]) == (edit != "unseen"), "torch does not count what is done to .data"
    assert sampled([net]) != before[1]
    assert content([net]) != before[2]


@pytest.mark.heavy
def test_an_edited_network_gives_another_picture(converted: Any, shallow: dict[str, Any]) -> None:
    pipe = converted(**shallow)
    first = run(pipe=pipe)
    pipe.unet.conv_out.weight.data.mul_(0.5)
    plain = pipeline(SDXLPipeline, **{**shallow, "unet": copy.deepcopy(pipe.unet)})
    assert distance(run(pipe=pipe), run(pipe=plain)) < SAME
    assert distance(run(pipe=pipe), first) > 1e-2


def test_content_is_that_of_a_copy_elsewhere(tmp_path: Path) -> None:
    net = copy.deepcopy(components()["unet"])
    net.up_blocks[0].s1 = None  # as FreeU leaves it when it is switched off
    for own in (net, components()["text_encoder"]):
        own.save_pretrained(tmp_path / type(own).__name__)
        assert content([type(own).from_pretrained(tmp_path / type(own).__name__)]) == content([own])


def test_libraries_tell_parked_weights_apart(tmp_path: Path) -> None:
    """By their storages, of which one with several weights would be saved as one of them."""
    net = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    bits = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        park([net], tmp_path)
    assert all(is_parked(layer.weight) and not is_parked(layer.bias) for layer in net)
    assert not any(parameter.is_inference() for parameter in net.parameters())
    save_model(net, str(tmp_path / "net.safetensors"))
    saved = load_file(tmp_path / "net.safetensors")
    assert saved.keys() == bits.keys()
    assert all(torch.equal(saved[name], bits[name]) for name in bits)
    first = net[0].weight.data_ptr()
    park([net], tmp_path)
    assert net[0].weight.data_ptr() == first, "it lies in a file already"
    torch.save(net[0].bias, tmp_path / "one.bin")
    assert (tmp_path / "one.bin").stat().st_size < 10_000
    with torch.enable_grad():
        net(torch.ones(1, 128)).sum().backward()
    assert net[0].weight.grad is not None


def test_parked_weights_have_the_same_bits_and_can_be_changed(tmp_path: Path) -> None:
    net = copy.deepcopy(components()["unet"])
    x, held = net.state_dict(), net.conv_in.weight.detach()
    bits = {name: value.clone() for name, value in x.items()}
    del x
    park([net], tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert net.conv_in.weight.data_ptr() == held.data_ptr(), "somebody else holds it"
    for name, value in net.state_dict().items():
        assert torch.equal(value, bits[name])
    with torch.no_grad():
        net.conv_out.weight.mul_(2)
    assert torch.equal(net.conv_out.weight, 2 * bits["conv_out.weight"])
    assert torch.equal(net.conv_out.bias, bits["conv_out.bias"])


@dataclass(frozen=True)
class Counting:
    """A network that no exporter can take: it looks at a number."""

    layer: Any

    @property
    def executed(self) -> tuple[Any, ...]:
        return (self.layer,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if float(y.sum()) > 0 else -y


def test_what_cannot_be_converted_runs_as_it_is_and_says_so(folder: Path) -> None:
    needs("openvino")
    engine = engines.OpenVINO(folder)
    network, x = Counting(nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(engine.network(network)(x), network(x))
        assert torch.equal(engine.network(network)(x), network(x))
    assert len(engine.notes) == 1
    assert engine.notes[0].startswith("Counting runs as it is, OpenVINO cannot: ")
    assert "\n" not in engine.notes[0]


def test_a_network_whose_weights_are_elsewhere_runs_as_it_is(folder: Path) -> None:
    needs("openvino")
    engine, layer, x = engines.OpenVINO(folder), nn.Linear(4, 4), torch.randn(2, 4)
    wanted = layer(x)
    cpu_offload(layer, torch.device("cpu"))
    network = engine.network(Layers(layer))
    for _ in range(2):
        engine.renew()
        assert torch.equal(network(x), wanted)
    assert engine.notes[0].startswith("Layers runs as it is, OpenVINO cannot: ")


def test_compiled_code_runs_on_the_card_of_what_it_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(aoti, "AOTICompiledModel", lambda loader: loader)
    monkeypatch.setattr(aoti, "outputs_of", lambda *_: ())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    assert engines.AOTI(folder).load(folder, None, (x,)).device == torch.device("cuda:1")
    assert asked == [1]
    assert "(1, 0)" in engines.AOTI(folder).machine(x.device)
    assert engines.AOTI(folder).load(folder, None, (torch.empty(2),)).device == torch.device("cpu")
    assert asked == [1, -1]


@dataclass(frozen=True)
class Layers:
    """A network of one module."""

    module: nn.Module

    @property
    def executed(self) -> tuple[Any, ...]:
        return (self.module,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


RUNTIMES = ["openvino", pytest.param("aoti", marks=pytest.mark.heavy)]


@pytest.fixture
def runtime(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "openvino":
        needs("openvino")
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(folder))
    return engines.ENGINES[request.param]()


@pytest.mark.parametrize("runtime", RUNTIMES, indirect=True)
def test_inputs_may_lie_in_memory_as_they_like(runtime: Any) -> None:
    """Of one shape, whichever came first: repeated rows, which are one in memory, and a picture with channels last."""
    for layer, shape in ((nn.Linear(4, 4), (1, 4)), (nn.Conv2d(4, 4, 3), (1, 4, 5, 6))):
        network, run = Layers(layer), runtime.network(Layers(layer))
        row, others = torch.randn(shape), torch.randn(2, *shape[1:])
        with torch.no_grad():
            for x in (row.expand_as(others), others, others.transpose(1, -1).contiguous().transpose(1, -1)):
                assert distance(run(x), network(x)) < SAME
    assert not runtime.notes


MEDDLING: dict[str, Any] = {
    "hook": lambda net: net[0].register_forward_hook(lambda *given: 3 * given[-1]),
    "hook before": lambda net: net[1].register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "forward": lambda net: setattr(net[0], "forward", lambda x: 2 * x),
    "method": lambda net: setattr(net[2], "_conv_forward", lambda x, weight, bias: 2 * x),
}


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
@pytest.mark.parametrize("how", MEDDLING)
def test_what_is_done_to_a_part_is_not_left_out_of_a_copy(how: str, runtime: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(3, 3, 1))
    x, network, run = torch.randn(3, 4, 4), Layers(net), runtime.network(Layers(net))
    with torch.no_grad():
        before = run(x)
        assert meddled([net]) is None
        MEDDLING[how](net)
        assert torch.equal(run(x), network(x))
        assert distance(network(x), before) > 1e-2
    assert [note.partition(": ")[2] for note in runtime.notes] == [meddled([net])]


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
def test_what_is_set_on_a_layer_is_seen(runtime: Any) -> None:
    """As scripts for seamless textures do, after a picture."""
    layer = nn.Conv2d(2, 2, 3, padding=1)
    x, network, run = torch.randn(1, 2, 8, 8), Layers(layer), runtime.network(Layers(layer))
    with torch.no_grad():
        before, hashed = run(x), content([layer])
        layer.padding_mode = "circular"
        assert distance(run(x), network(x)) < SAME
        assert distance(network(x), before) > 1e-2
    assert content([layer]) != hashed
    assert not runtime.notes


class Taking(Engine):
    """Tells what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[str] = []

    def network(self, network: Any) -> Any:
        self.given.append(type(network).__name__)
        return network


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
@pytest.mark.parametrize("make", [make_vae, movq])
def test_start_pictures_are_read_by_the_engine(make: Any, runtime: Any) -> None:
    """One that stands several times once; latents are drawn from what it says of it, if that is a distribution."""
    vae, pixels = make(), torch.rand(2, 3, 16, 16) * 2 - 1
    for rows, numbers in ((pixels, [1]), (pixels[[0, 0, 1]], [1, 2, 3])):
        plain, own = (
            encode_picture(vae, rows, seeds(*numbers), torch.float32, engine=engine) for engine in (eager, runtime)
        )
        assert distance(own, plain) < SAME
    assert distance(encode_mode(vae, pixels, engine=runtime), encode_mode(vae, pixels)) < SAME
    assert [type(key[0]).__name__ for key in runtime.made] == ["Encoder"] * 2, "for two pictures, and for one"
    assert not runtime.notes


@pytest.mark.parametrize("make", [make_vae, movq])
def test_a_picture_for_several_generators_is_encoded_once(make: Any) -> None:
    """And gives the bits that it gives alone."""
    vae, pixels, engine = make(), torch.rand(2, 3, 16, 16) * 2 - 1, Taking()
    rows = [0, 0, 1]
    alone = [encode_picture(vae, pixels[[k]], seeds(n), torch.float32) for n, k in enumerate(rows)]
    together = encode_picture(vae, pixels[rows], seeds(0, 1, 2), torch.float32, engine=engine)
    assert torch.equal(together, torch.cat(alone))
    assert engine.given == ["Encoder"] * 2


@pytest.mark.parametrize("tiles", [False, True])
def test_pictures_that_are_cut_in_tiles_go_through_the_autoencoders_own_loop(tiles: bool) -> None:
    vae, engine = make_vae(), Taking()
    vae.tile_sample_min_size, vae.use_tiling = 8, tiles
    encode_picture(vae, torch.rand(1, 3, 16, 16), seeds(1), torch.float32, engine=engine)
    assert engine.given == ([] if tiles else ["Encoder"])


def test_an_autoencoder_whose_encode_was_replaced_is_no_engines() -> None:
    vae, pixels, engine = make_vae(), torch.rand(1, 3, 16, 16), Taking()
    plain, own = encode_mode(vae, pixels, engine=engine), vae.encode
    vae.encode = lambda x, **more: own(1 - x, **more)
    assert distance(encode_mode(vae, pixels, engine=engine), plain) > 1e-2
    assert engine.given == ["Encoder"]
    assert engine.notes == ["Encoder runs as it is, eager cannot: the autoencoder's encode was replaced"]


def test_an_autoencoder_whose_decode_was_replaced_is_no_engines() -> None:
    vae, latents, engine = make_vae(), torch.randn(1, 4, 8, 8), Taking()
    plain = decode_latents(vae, latents, engine=engine)
    assert engine.given == ["Decoder"]
    own = vae.decode
    vae.decode = lambda z, **more: own(-z, **more)
    assert torch.equal(decode_latents(vae, latents), decode_latents(vae, latents, engine=engine))
    assert not eager.notes, "it is everybody's"
    assert distance(decode_latents(vae, latents, engine=engine), plain) > 1e-2
    assert engine.given == ["Decoder"]
    assert engine.notes == ["Decoder runs as it is, eager cannot: the autoencoder's decode was replaced"]


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
def test_a_copy_of_an_engine_runs_other_weights(runtime: Any) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        first = runtime.network(Layers(layer))(x)
        other, own = copy.deepcopy((layer, runtime))
        other.weight.mul_(2)
        assert distance(own.network(Layers(other))(x), other(x)) < SAME
        assert torch.equal(runtime.network(Layers(layer))(x), first)
        assert distance(pickle.loads(pickle.dumps(runtime)).network(Layers(layer))(x), first) < SAME
    assert not runtime.notes


def test_a_copy_of_a_compiled_pipeline_runs_other_weights() -> None:
    pipe = pipeline(SDXLPipeline, unet=small()[1])
    pipe.engine = Compiled(backend="eager")
    run(pipe=pipe, num_inference_steps=2)
    other = copy.deepcopy(pipe)
    other.unet.conv_out.weight.data = 2 * other.unet.conv_out.weight
    plain = pipeline(SDXLPipeline, unet=other.unet)
    assert distance(run(pipe=other, num_inference_steps=2), run(pipe=plain, num_inference_steps=2)) < SAME


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
def test_weights_are_looked_at_once_in_a_run(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(converting, "state", lambda nets: looks.append(1) or state(nets))
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    run = runtime.network(Layers(layer))
    with torch.no_grad():
        first = run(x)
        looks.clear()
        runtime.begin([layer])
        assert all(torch.equal(run(x), first) for _ in range(3))
        runtime.end()
        assert len(looks) == 1
        layer.weight.mul_(2)
        assert distance(run(x), layer(x)) < SAME
    assert len(looks) == 3, "before, and of what was made of the other weights"


def test_what_libraries_set_is_no_meddling() -> None:
    """torchao tells of weights in another way, accelerate warns of moving, and puts a forward back when hooks go."""
    layer = nn.Linear(4, 4)
    add_hook_to_module(layer, ModelHook())
    assert meddled([layer]) is None
    remove_hook_from_module(layer)
    assert "forward" in vars(layer)
    layer.extra_repr, layer.to = (lambda: "int8"), partial(layer.to)
    assert meddled([layer]) is None
    assert changed(layer) is None
    layer.forward = partial(layer.forward)
    assert meddled([layer]) == "the forward of a part of it was replaced"


def test_own_attention_of_an_autoencoder_is_seen() -> None:
    class Own(AttnProcessor2_0):
        pass

    vae = make_vae()
    assert meddled([vae.decoder]) is None
    vae.set_attn_processor(Own())
    assert meddled([vae.decoder]) == "it has attention processors of its own"


@pytest.mark.parametrize("runtime", ["openvino"], indirect=True)
def test_what_fails_when_it_runs_runs_as_it_is_from_then_on(runtime: Any) -> None:
    network, x = Layers(nn.Linear(4, 4)), torch.randn(2, 4)

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory\nat all")

    with torch.no_grad():
        runtime.network(network)(x)
        ((key, known),) = runtime.made.items()
        runtime.made[key] = known._replace(runner=fail)
        for _ in range(2):
            assert torch.equal(runtime.network(network)(x), network(x))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            runtime.network(network)(torch.randn(2, 5))
    assert runtime.notes[0] == "Layers runs as it is, OpenVINO cannot: no memory"


def test_an_engine_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(SDXLPipeline)
    with pytest.raises(ValueError, match="no engine 'openvin'; there are eager, packed, openvino"):
        pipe.optimize(engine="openvin")
    with pytest.raises(ValueError, match="level is 'exakt'; it must be exact, half, fast"):
        pipe.optimize("exakt")
    monkeypatch.setitem(sys.modules, "openvino", None)
    told = pipe.optimize(engine="openvino")
    assert "openvino is not installed: pip install 'diffusion_kit[openvino]': the fastest engine here" in told
    assert pipe.optimize(engine="cudagraph").count("cudagraph is for CUDA, the pipeline is on cpu: the fastest") == 1
    told = pipe.optimize()
    assert "was the fastest over a block of the UNet" in told
    assert "not measured: inductor and aoti compile for minutes" in told
    assert told.count("openvino is not installed") == told.count("openvino") // 2 == 1, "beside the name to install"


def test_an_engine_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('undefined symbol\\nfrom somewhere')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    told = pipeline(SDXLPipeline).optimize()
    assert "openvino cannot be imported: undefined symbol" in told
    assert "somewhere" not in told


def test_measuring_draws_no_number_that_pictures_would_have() -> None:
    pipe = pipeline(SDXLPipeline)
    before = torch.get_rng_state()
    pipe.optimize()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prior_has_no_block_to_measure() -> None:
    prior = build(diffusion_kit, "KandinskyV22CombinedPipeline").prior_pipe
    assert "eager: this network has no blocks to measure" in prior.optimize()


def test_the_fastest_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, which here says that every engine but one takes a second."""
    told: list[str] = []

    class Slow(Engine):
        name = "slow"

        def network(self, network: Any) -> Any:
            told.append(self.name)
            return network

    class Quick(Slow):
        name = "quick"

    clock = iter(range(10**6))
    monkeypatch.setattr(engines, "QUICK", ("slow", "quick"))
    monkeypatch.setattr(engines, "ENGINES", {"slow": Slow, "quick": Quick})
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(clock) * (told[-1] == "slow"))
    engine, seconds = engines.fastest(components()["unet"])
    assert engine.name == "quick"
    assert seconds.keys() == {"slow", "quick"}


def test_an_engine_that_could_not_is_not_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Engine):
        name = "failing"

        def network(self, network: Any) -> Any:
            self.note("runs as it is")
            return network

    class Raising(Engine):
        name = "raising"

        def network(self, network: Any) -> Any:
            raise RuntimeError("no memory")

    monkeypatch.setattr(engines, "QUICK", ("eager", "failing", "raising"))
    monkeypatch.setitem(engines.ENGINES, "failing", Failing)
    monkeypatch.setitem(engines.ENGINES, "raising", Raising)
    engine, seconds = engines.fastest(components()["unet"])
    assert (engine.name, list(seconds)) == ("eager", ["eager"])


def test_the_block_that_is_measured_has_attention() -> None:
    """The deepest of a Stable Diffusion 1.x has none; blocks of Kandinsky 3 are of another kind."""
    probe, inputs = engines.make_probe(make_sd_unet())
    assert probe.transformer is not None
    assert probe(*inputs).shape[0] == 2
    pipe = Kandinsky3Pipeline(**copy.deepcopy(kandinsky3_components()))
    assert "eager: this network has no blocks to measure" in pipe.optimize()


@pytest.mark.parametrize("more", [{"engine": "cudagrap"}, {"quantised": "int3"}])
def test_what_is_refused_changes_nothing(more: dict[str, Any]) -> None:
    pipe = pipeline(SDXLPipeline, **copy.deepcopy(components()))
    with pytest.raises(ValueError, match="no engine 'cudagrap'|quantised is 'int3'"):
        pipe.optimize("half", **more)
    assert pipe.unet.dtype == torch.float32


def test_half_is_of_controls_that_were_loaded_before_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: True)
    pipe = AutoPipelineForText2Image.from_pretrained("default")
    net = pipe.load_control("canny")
    pipe.optimize("half", engine="eager")
    assert {weight.dtype for own in (net, pipe.unet) for weight in own.parameters()} == {torch.bfloat16}


def test_a_folder_that_nobody_fills_any_more_goes(tmp_path: Path) -> None:
    left, young = tmp_path / ".openvino-a-x", tmp_path / ".openvino-b-x"
    for folder in (left, young):
        folder.mkdir()
    os.utime(left, (0, 0))
    with whole_folder(tmp_path / "openvino-c"):
        assert not left.exists()
        assert young.exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "a"
    assert [path.name for path in tmp_path.iterdir()] in ([], ["a"])


def test_a_folder_is_there_whole_or_not_at_all(interrupted: Path) -> None:
    def fill() -> None:
        with whole_folder(interrupted) as new:
            assert new is not None
            (new / "half").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert not interrupted.exists()
    with whole_folder(interrupted) as new:
        assert new is not None
        (new / "b").write_text("b")
    assert [file.name for file in interrupted.iterdir()] == ["b"]
    with whole_folder(interrupted) as new:
        assert new is None


def test_of_two_who_make_a_folder_the_first_has_the_name(tmp_path: Path) -> None:
    """And whoever may read what is new in the folder above may read it."""
    with whole_folder(tmp_path / "a") as slow:
        (slow / "whose").write_text("slow")
        with whole_folder(tmp_path / "a") as quick:
            (quick / "whose").write_text("quick")
    assert (tmp_path / "a" / "whose").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_cache_has_a_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the system says what lies in memory, and which is the same in another working directory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", "link/cache")
    assert engines.cache_folder() == tmp_path / "real" / "cache"


@pytest.mark.parametrize(
    ("device", "loaded", "runs"),
    [
        ("cuda", torch.float32, torch.float16),
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, torch.float16),
        ("cpu", torch.float32, torch.bfloat16),
        ("cpu", torch.float16, torch.bfloat16),
    ],
)
def test_half_precision_that_is_there_is_kept_on_a_gpu(
    device: str, loaded: Any, runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: True)
    assert half_of(torch.device(device), loaded) == runs


@pytest.mark.parametrize("level", ["half", "fast"])
def test_weights_of_half_precision_a_schedule_of_float32(level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: True)
    pipe, seen = pipeline(SDXLPipeline, **copy.deepcopy({**components(), "unet": small()[1]})), set[Any]()
    exact = run(pipe=pipe, num_inference_steps=6)
    sample = base.sample

    def watched(run: Any, latents: torch.Tensor, on_call: Any) -> torch.Tensor:
        def look(k: int, *tensors: torch.Tensor) -> Any:
            seen.update(own.dtype for own in tensors)
            return on_call(k, *tensors)

        return sample(run, latents, look)

    monkeypatch.setattr(base, "sample", watched)
    pipe.optimize(level, engine="eager")
    own = run(pipe=pipe, num_inference_steps=6)
    assert {own.dtype for own in pipe.unet.parameters()} == {torch.bfloat16}
    assert seen == {torch.float32}, "latents, and predictions behind guidance"
    assert 1e-5 < distance(own.float(), exact) < HALF[level]
    assert pipe.step_cache == (StepCache(**FAST) if level == "fast" else None)
    assert ("deep features reused" in pipe.done) == (level == "fast")
    pipe.optimize("exact", engine="eager")
    assert pipe.step_cache is None


@pytest.mark.parametrize("level", ["half", "fast"])
def test_a_cpu_without_bfloat16_stays_in_float32_and_says_so(level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: False)
    pipe = pipeline(SDXLPipeline, **copy.deepcopy(components()))
    said = str(pipe.optimize(level, engine="eager"))
    assert {own.dtype for own in pipe.unet.parameters()} == {torch.float32}
    assert "this CPU has no arithmetic in bfloat16: weights are in float32" in said
