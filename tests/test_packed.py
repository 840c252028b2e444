"""Packed layers: the same numbers, no second copy of a weight, and plain layers again for whoever looks at them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_kandinsky
import torch
from conftest import (
    components,
    crossed,
    distance,
    light,
    lines,
    make_adapter,
    make_controlnet,
    make_vae,
    pipeline,
    seeds,
)
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from test_loaders import save_lora
from test_mixtures import KINDS, TASKS, run
from torch import nn
from torch.nn.utils import prune

import diffusion_kit
from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.models import onednn, packed
from diffusion_kit.models import tiled_attention as attention_by_tiles
from diffusion_kit.models.packed import Packed, layers_of, pack_all, pack_layer, unpack
from diffusion_kit.models.tiled_attention import tiled_attention
from diffusion_kit.pipelines.optimize import sizes_of
from diffusion_kit.sampling.engines.pages import PAGEMAP, FilePages
from diffusion_kit.sampling.engines.weights import park

WHY = {dtype: onednn.obstacle(dtype) for dtype in onednn.DTYPES}
pytestmark = pytest.mark.skipif(WHY[torch.float32] is not None, reason=str(WHY[torch.float32]))
DTYPES = [pytest.param(own, marks=pytest.mark.skipif(why is not None, reason=str(why))) for own, why in WHY.items()]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (2, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (7, 24)),
    "convolution": (lambda: nn.Conv2d(12, 20, 3, padding=1), (2, 12, 9, 7)),
    "strided": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 9, 7)),
    "of one pixel": (lambda: nn.Conv2d(12, 20, 1, bias=False), (2, 12, 9, 7)),
    "grouped": (lambda: nn.Conv2d(12, 24, 3, groups=3, dilation=2, padding=2), (1, 12, 8, 8)),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_gives_the_same_and_holds_no_plain_weight(name: str, dtype: torch.dtype) -> None:
    layer, x = made(name, dtype)
    expected, plain, kind = layer(x), weakref.ref(layer.weight), type(layer)
    bits = layer.weight.detach().clone()
    assert pack_layer(layer)
    gc.collect()
    assert plain() is None
    assert isinstance(layer, kind)
    assert isinstance(layer, Packed)
    assert distance(layer(x), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert distance(layer(x.transpose(0, 1).contiguous().transpose(0, 1)), expected) < 1e-2
    assert isinstance(layer, Packed)
    assert torch.equal(layer.weight, bits)
    assert type(layer) is kind


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_convolution_does_not_lay_its_weight_out_in_every_call(
    capfd: pytest.CaptureFixture[str], two_threads: None
) -> None:
    """oneDNN does so, slower than it computes, where the layout is not the one for the input's shape and the threads."""
    layer, verbose = nn.Conv2d(256, 256, 3, padding=1), torch.backends.mkldnn.VERBOSE_ON
    bits = layer.weight.detach().clone()
    assert pack_layer(layer)
    for threads, batch, side in ((2, 2, 8), (2, 1, 32), (2, 2, 32), (1, 2, 32), (2, 2, 32), (2, 4, 64)):
        torch.set_num_threads(threads)
        x = torch.randn(batch, 256, side, side).to(memory_format=torch.channels_last)
        first = layer(x)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(verbose):
            again = layer(x)
        calls = [line.partition(",exec,cpu,")[2] for line in capfd.readouterr().out.splitlines()]
        assert [call.partition(",")[0] for call in calls if call] == ["convolution"]
        assert torch.equal(first, again)
    assert torch.equal(layer.weight, bits)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda layer: layer.weight,
    "parameters": lambda layer: [*layer.parameters()][0],
    "of a parent": lambda layer: nn.Sequential(layer).state_dict()["0.weight"],
    "copy": lambda layer: copy.deepcopy(layer).weight,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).weight,
    "to": lambda layer: layer.to(torch.float64).to(torch.float32).weight,
    "half": lambda layer: layer.bfloat16().float().weight - layer.weight + layer.weight,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_whoever_looks_sees_the_same_bits(name: str, look: str) -> None:
    (layer, x), (plain, _) = made(name), made(name)
    pack_layer(layer)
    assert torch.equal(LOOKS[look](layer), LOOKS[look](plain))
    assert type(layer) is type(plain)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]
    pack_layer(layer)
    assert distance(layer(x), plain(x)) < 1e-5


EDITS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "load": lambda layer, new: layer.load_state_dict({**layer.state_dict(), "weight": new}),
    "in place": lambda layer, new: layer.weight.copy_(new),
    "assigned": lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
    "data": lambda layer, new: setattr(layer.weight, "data", new),
    "bias": lambda layer, new: layer.bias.add_(1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_packed_layer_counts(edit: str) -> None:
    (layer, x), (plain, _) = made("linear"), made("linear")
    before = plain(x)
    new = torch.randn_like(plain.weight)
    pack_layer(layer)
    for own in (layer, plain):
        EDITS[edit](own, new.clone())
    pack_layer(layer)
    assert isinstance(layer, Packed)
    assert distance(layer(x), plain(x)) < 1e-5 < distance(before, plain(x))


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda layer: layer.weight,
    "data": lambda layer: layer.weight.data,
    "state dict": lambda layer: layer.state_dict()["weight"],
    "view": lambda layer: layer.weight.detach()[:1],
}


@pytest.mark.parametrize("held", HOLDERS)
def test_a_weight_that_somebody_holds_stays_plain(held: str) -> None:
    layer, _ = made("linear")
    kept = HOLDERS[held](layer)
    assert not pack_layer(layer)
    assert kept.data_ptr() == layer.weight.data_ptr()
    del kept
    assert pack_layer(layer)


def test_layers_that_share_a_weight_stay_plain() -> None:
    one, other = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    other[0].weight = one[0].weight
    engine = packed.Packing()
    engine.begin([one, other])
    engine(None, None, None)  # type: ignore[arg-type]
    assert [isinstance(layer, Packed) for layer in (*one, *other)] == [False, True, False, True]
    assert other[0].weight is one[0].weight


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupt_leaves_a_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made("linear")
    expected = layer(x)
    monkeypatch.setattr(onednn, "laid_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_layer(layer)
    assert torch.equal(layer(x), expected)
    monkeypatch.undo()
    pack_layer(layer)
    monkeypatch.setattr(nn, "Parameter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(layer)
    monkeypatch.undo()
    assert isinstance(layer, Packed)
    assert torch.equal(copy.copy(layer).weight, made("linear")[0].weight)
    assert distance(layer(x), expected) < 1e-5


def test_what_is_set_of_a_packed_layer_counts() -> None:
    (layer, x), (plain, _) = made("convolution"), made("convolution")
    pack_layer(layer)
    for own in (layer, plain):
        own.padding_mode = "circular"
        own._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert not pack_layer(layer)
    assert torch.equal(layer(x), plain(x))
    (layer, x), seen = made("convolution"), []
    before = layer._conv_forward
    layer._conv_forward = lambda *given: seen.append(1) or before(*given)
    assert not pack_layer(layer)
    assert torch.equal(layer(x), made("convolution")[0](x))
    assert seen


def test_a_hook_runs_once_and_a_kept_forward_goes_on() -> None:
    layer, x = made("linear")
    expected, forward = layer(x), layer.forward
    layer.register_forward_hook(lambda _, __, output: 2 * output)
    pack_layer(layer)
    assert distance(layer(x), 2 * expected) < 1e-5
    with torch.enable_grad():
        assert distance(layer(x).detach(), 2 * expected) < 1e-5
    packed_forward = layer.forward if pack_layer(layer) else None
    unpack(layer)
    assert torch.equal(packed_forward(x), forward(x))  # type: ignore[misc]


def test_layers_made_and_run_under_inference_mode() -> None:
    with torch.inference_mode():
        inside, x = made("linear")
        assert not pack_layer(inside)
    layer, x = made("linear")
    expected = layer(x)
    with torch.inference_mode():
        for _ in range(2):
            assert pack_layer(layer)
            assert distance(layer(x), expected) < 1e-5
            assert not layer.weight.is_inference()


def test_what_a_packed_operation_cannot_do_the_plain_layer_does() -> None:
    layer, x = made("linear")
    pack_layer(layer)
    with torch.enable_grad():
        layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    pack_layer(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    pack_layer(layer)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.double())
    convolution, x = made("convolution")
    expected = convolution(x[0])
    pack_layer(convolution)
    assert torch.equal(convolution(x[0]), expected)  # without a batch
    pruned = prune.identity(nn.Linear(3, 4), "weight")
    graded = nn.Linear(3, 4)
    graded.weight.grad = torch.ones_like(graded.weight)
    others = (nn.Linear(3, 4).half(), nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(3, 4, 3), pruned, graded)
    assert not any(map(pack_layer, others))


def test_to_ask_whether_layers_can_be_packed_draws_nothing() -> None:
    onednn.obstacle.cache_clear()
    packed.alone.cache_clear()
    before = torch.random.get_rng_state()
    assert onednn.obstacle(torch.float32) is None
    assert packed.alone()
    assert torch.equal(torch.random.get_rng_state(), before)


def gate(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[GEGLU, torch.Tensor]:
    torch.manual_seed(0)
    return GEGLU(24, 40, bias=bias).to(dtype), torch.randn(2, 5, 24, dtype=dtype)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_layer_is_two_products_and_plain_again(
    dtype: torch.dtype, bias: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "WIDE", wide)
    layer, x = gate(dtype, bias)
    expected, bits = layer(x), layer.proj.weight.detach().clone()
    pack_all(packed.layers_of([layer]))
    assert len(vars(layer.proj)["_packed"].parts) == 2
    assert distance(layer(x), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (
        distance(layer.proj(x).chunk(2, -1)[1], nn.functional.linear(x, bits, layer.proj.bias).chunk(2, -1)[1]) < 1e-2
    )
    assert torch.equal(layer.proj.weight, bits)
    assert distance(layer(x), expected) == 0, "looked at, it is as it was"
    pack_all(packed.layers_of([layer]))
    packed.unpack_all([layer])
    assert type(layer) is GEGLU
    assert torch.equal(layer.proj.weight, bits)


def test_a_gated_layer_with_a_hook_runs_it() -> None:
    layer, x = gate()
    pack_all(packed.layers_of([layer]))
    seen: list[int] = []
    layer.proj.register_forward_hook(lambda *given: seen.append(1))
    layer(x)
    assert seen == [1]


def test_a_gated_layer_is_copied_and_pickled_plain() -> None:
    layer, x = gate()
    expected = layer(x)
    for again in (copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))):
        pack_all(packed.layers_of([layer]))
        other = again(layer)
        assert distance(other(x), expected) == 0
        assert not isinstance(other.proj, Packed)


@pytest.mark.parametrize("linear", [True, False])
def test_a_transformer_keeps_channels_last_and_its_numbers(linear: bool) -> None:
    torch.manual_seed(0)
    net = Transformer2DModel(2, 16, 32, norm_num_groups=8, use_linear_projection=linear).eval()
    x = torch.randn(2, 32, 6, 4).contiguous(memory_format=torch.channels_last)
    expected = net(x).sample
    assert not expected.is_contiguous(memory_format=torch.channels_last), "diffusers lays it out anew"
    pack_all(packed.layers_of([net]))
    made = net(x).sample
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert distance(made, expected) < 1e-5
    other = copy.deepcopy(net)
    assert type(other) is type(net) is Transformer2DModel, "a look gives its class back"
    pack_all(packed.layers_of([net]))
    packed.unpack_all([net])
    assert type(net) is Transformer2DModel
    assert distance(net(x).sample, expected) == 0


@pytest.mark.skipif(not PAGEMAP.exists(), reason="pages of files are seen on Linux")
def test_packing_weights_of_a_file_lets_its_pages_go(tmp_path: Path) -> None:
    """Of a file that is mapped, only pages that were changed stay in memory beside the packed copy."""
    torch.save(nn.Linear(1024, 2048).state_dict(), tmp_path / "net.pt")
    layer = nn.Linear(1024, 2048)
    layer.load_state_dict(torch.load(tmp_path / "net.pt", mmap=True), assign=True)
    layer.weight.data[7, :] = 3.0  # a page that is no more the file's
    bits = layer.weight.detach().clone()

    def files() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * 4096

    held = layer.weight.data
    before = files()
    FilePages().forget(held)
    assert files() < before - 7_000_000, "of 8 MiB"
    assert torch.equal(layer.weight, bits)


@pytest.mark.parametrize(
    ("queries", "keys"), [(256, 256), (300, 129), (2048, 4096), (64, 512), (512, 77), (1024, 512), (8192, 77)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled_attention_is_attention(
    queries: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_by_tiles, "MKL_IS_FAST", dict.fromkeys(onednn.DTYPES, False))
    monkeypatch.setattr(attention_by_tiles, "AT_ONCE", 2**21)  # of six heads of 1024 x 512, four and two
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2) for n in (queries, keys, keys))
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    found = tiled_attention(*(x.to(dtype) for x in (q, k, v)))
    assert found.shape == expected.shape
    assert (found.float() - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("wide", [False, True])
def test_no_operation_writes_tensors_out(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does where it has to find which overload is meant: a tenth of a step's time."""
    monkeypatch.setattr(onednn, "WIDE", wide)
    written: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda own, **_: written.append(own) or "")
    net = nn.Sequential(GEGLU(24, 40), nn.Linear(40, 24), nn.Unflatten(1, (24, 1, 1)), nn.Conv2d(24, 8, 1)).eval()
    with torch.no_grad():
        expected = net(torch.ones(5, 24))
        pack_all(layers_of([net]))
        found = net(torch.ones(5, 24))
    assert sum(isinstance(layer, Packed) for layer in net.modules()) == 3
    assert not written
    assert distance(found, expected) < 1e-5


def test_of_a_dtype_that_onednn_has_not_torch_takes_care() -> None:
    q = torch.randn(1, 2, 256, 16, dtype=torch.float64)
    assert torch.equal(tiled_attention(q, q, q), nn.functional.scaled_dot_product_attention(q, q, q))
    half = pipeline(SDXLPipeline, **copy.deepcopy(components())).to(torch.float16)
    assert "not float16: the fastest engine here takes its place" in half.optimize(engine="packed")


# Pipelines


def packing(**more: Any) -> Any:
    pipe = pipeline(SDXLPipeline, **{**copy.deepcopy(components()), **more})
    pipe.optimize(engine="packed")
    return pipe


def count(net: nn.Module) -> int:
    return sum(isinstance(layer, Packed) for layer in net.modules())


@pytest.mark.parametrize(("task", "kind"), crossed(TASKS, KINDS))
def test_the_same_picture_with_every_control(kind: str, task: str) -> None:
    plain = run([KINDS[kind]()], task)
    pipe = packing(vae=make_vae(4))
    assert distance(run([KINDS[kind]()], task, pipe), plain) < 1e-4
    assert count(pipe.unet) > 100
    assert "engine     packed" in pipe.explain()


def test_the_same_picture_where_attention_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small networks attend to fewer tokens than are worth it."""
    tiles = []
    own = attention_by_tiles.product
    monkeypatch.setattr(attention_by_tiles, "MKL_IS_FAST", dict.fromkeys(onednn.DTYPES, False))
    monkeypatch.setattr(attention_by_tiles, "FEWEST", 1)
    monkeypatch.setattr(attention_by_tiles, "SCORES", 512)
    monkeypatch.setattr(attention_by_tiles, "product", lambda *pair: tiles.append(len(pair[0])) or own(*pair))
    plain = run([KINDS["ip_adapter"]()])
    assert not tiles
    assert distance(run([KINDS["ip_adapter"]()], pipe=packing(vae=make_vae(4))), plain) < 1e-4
    assert len(set(tiles)) > 1


@pytest.mark.parametrize(
    "name",
    light(["KandinskyV22CombinedPipeline", "KandinskyCombinedPipeline", "Kandinsky3Pipeline"], "Kandinsky3Pipeline"),
)
def test_the_same_picture_of_a_kandinsky(name: str) -> None:
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    call |= {"prior_num_inference_steps": 2, "height": 64, "width": 64} if "Combined" in name else {}
    pipe = copy.deepcopy(test_kandinsky.build(diffusion_kit, name))
    plain = pipe(**call, generator=seeds(1)).images
    pipe.optimize(engine="packed")
    assert distance(pipe(**call, generator=seeds(1)).images, plain) < 1e-4
    nets = [pipe.unet, *([pipe.prior_prior] if "Combined" in name else [])]
    assert all(map(count, nets))


def test_the_same_picture_with_a_window_and_kept_features() -> None:
    pipes = [pipeline(SDXLPipeline), packing()]
    controls = [Control(make_adapter(), lines(1), end=0.5), Control(make_controlnet(), lines(2), start=0.5)]
    for pipe in pipes:
        pipe.cache_steps(2)
    a, b = (run(controls, pipe=pipe) for pipe in pipes)
    assert distance(b, a) < 1e-4


def test_a_lora_after_packing_acts_and_goes(tmp_path: Path) -> None:
    save_lora(tmp_path, "a", 1)
    pipes = [pipeline(SDXLPipeline, **copy.deepcopy(components())), packing()]
    results = []
    for pipe in pipes:
        before = run(pipe=pipe)
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
        loaded = run(pipe=pipe)
        pipe.fuse_lora(lora_scale=0.6)
        fused = run(pipe=pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        results.append([before, loaded, fused, run(pipe=pipe)])
    for a, b in zip(*results, strict=True):
        assert distance(b, a) < 1e-4
    assert distance(results[0][1], results[0][0]) > 1e-2 < distance(results[0][2], results[0][1])


def test_a_saved_pipeline_has_the_same_bits(tmp_path: Path) -> None:
    pipe = packing()
    run(pipe=pipe)
    assert count(pipe.unet)
    pipe.save_pretrained(tmp_path)
    again = SDXLPipeline.from_pretrained(tmp_path)
    for name, value in components()["unet"].state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], value), name


def test_a_network_with_a_forward_of_its_own_is_not_said_to_be_packed() -> None:
    pipe = packing()
    assert "engine     packed" in pipe.explain()
    pipe.unet.register_forward_hook(lambda *_: None)
    assert "engine     packed" not in pipe.explain()
    run(pipe=pipe)
    assert not count(pipe.unet)


def test_layers_whose_weights_lie_in_a_file_are_packed(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    x = torch.randn(4, 64)
    with torch.no_grad():
        plain = net(x)
        park([net], tmp_path)
        pack_all(net)
        assert count(net) == 3
        assert distance(net(x), plain) < 1e-5


def test_explained_without_a_look_at_packed_weights() -> None:
    pipe = packing()
    net, unet = components()["unet"], sum(p.nbytes for p in pipe.unet.parameters())
    run(pipe=pipe)
    packed = count(pipe.unet)
    assert packed > 9
    told = pipe.explain()
    assert count(pipe.unet) == packed
    assert f"unet by packed: UNet2DConditionModel, float32, {unet / 1e6:,.0f} MB" in told
    assert "text_encoder by packed" in told
    assert "of weights in all" in told
    assert sizes_of(pipe.unet) == {torch.float32: unet} == sizes_of(net)


def test_another_engine_finds_plain_layers() -> None:
    pipe = packing()
    first = run(pipe=pipe)
    pipe.optimize(engine="eager")
    assert distance(run(pipe=pipe), first) < 1e-4
    assert not count(pipe.unet)
