"""Control-LoRA: beside a plain ControlNet whose weights are merged here, run by diffusers; and what is shared and kept."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    crossed,
    distance,
    half_mask,
    lines,
    make_adapter,
    make_sd_unet,
    make_unet,
    make_vae,
    picture,
    pipeline,
    randomise,
    sd_pipeline,
    seeds,
)
from peft import LoraConfig
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor

import diffusion_kit
from diffusion_kit import Control
from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.adapters.control_lora import FILES, ControlLoRA

CALL = {"prompt": "a red fox", "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
TASKS: dict[str, dict[str, Any]] = {
    "": {"height": 64, "width": 64},
    "Img2Img": {"image": picture(), "strength": 0.9},
    "Inpaint": {"image": picture(), "mask_image": half_mask(), "strength": 0.9, "height": 64, "width": 64},
}
BASES: dict[str, Any] = {"StableDiffusionXL": make_unet, "StableDiffusion": make_sd_unet}
RANK = 4
Tensors = dict[str, torch.Tensor]

# diffusers' names, and those of the original UNet that Stability's files have.
PARTS = (
    (r"^conv_in", "input_blocks.0.0"),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^controlnet_down_blocks\.(\d)", r"zero_convs.\1.0"),
    (r"^controlnet_mid_block", "middle_block_out.0"),
    (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"^controlnet_cond_embedding\.blocks\.(\d)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
    (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    (r"\.norm1\.(?=\w+$)", ".in_layers.0."),
    (r"\.norm2\.(?=\w+$)", ".out_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)


def original(name: str) -> str:
    for pattern, new in PARTS:
        if "transformer_blocks" not in name or pattern.startswith("^"):
            name = re.sub(pattern, new, name)
    return name


@cache
def base(family: str) -> Any:
    return BASES[family]()


@cache
def made(family: str) -> tuple[Tensors, Any]:
    """A file's tensors, and the ControlNet that they stand for: every matrix of the encoder is changed, and of biases and
    norms every second one is another."""
    hint = {"conditioning_embedding_out_channels": (8, 8, 16, 16)}
    net = randomise(diffusers.ControlNetModel.from_unet(base(family), **hint), 8)
    own = diffusers.ControlNetModel.from_unet(base(family), **hint).state_dict()
    generator = seeds(5)
    tensors: Tensors = {"lora_controlnet": torch.tensor([])}
    for number, (name, value) in enumerate(net.state_dict().items()):
        if name.startswith("controlnet_"):
            tensors[original(name)] = value.clone()
        elif value.ndim == 1 and number % 2:
            value.copy_(own[name] + 0.3 * torch.randn(value.shape, generator=generator))
            tensors[original(name)] = value.clone()
        elif value.ndim == 1:
            value.copy_(own[name])
        else:
            up = torch.randn(value.shape[0], RANK, *(1,) * (value.ndim - 2), generator=generator)
            down = torch.randn(RANK, *value.shape[1:], generator=generator) / value[0].numel() ** 0.5
            value.copy_(own[name] + torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(value.shape))
            stem = original(name).removesuffix(".weight")
            tensors[f"{stem}.up"], tensors[f"{stem}.down"] = up, down
    return tensors, net


def lora(family: str = "StableDiffusionXL") -> ControlLoRA:
    return ControlLoRA(made(family)[0])


def pipe_of(module: Any, family: str, task: str = "", **parts: Any) -> Any:
    build = sd_pipeline if family == "StableDiffusion" else pipeline
    kind = "ControlNet" if "controlnet" in parts else ""
    parts = {"unet": base(family), "vae": make_vae(levels=4), **parts}
    return build(getattr(module, f"{family}{kind}{task}Pipeline"), **parts)


def run(controls: Any = (), family: str = "StableDiffusionXL", task: str = "", pipe: Any = None, **more: Any) -> Any:
    pipe = pipe or pipe_of(diffusion_kit, family, task)
    return pipe(**{**CALL, **TASKS[task], "generator": seeds(1), **more}, controls=controls).images


@pytest.mark.parametrize(("task", "family"), crossed(TASKS, BASES))
def test_latents_are_those_of_the_merged_controlnet_in_the_peer(family: str, task: str) -> None:
    peer = pipe_of(diffusers, family, task, controlnet=made(family)[1])
    beside = {"image" if task == "" else "control_image": lines(), "controlnet_conditioning_scale": 0.7}
    theirs = peer(**{**CALL, **TASKS[task], **beside, "generator": seeds(1)}).images
    control = Control(lora(family), lines(), scale=0.7)
    assert distance(run([control], family, task), theirs) < 1e-4
    assert distance(run((), family, task), theirs) > 1e-2
    plain = copy.deepcopy(made(family)[1])
    plain.load_state_dict(base(family).state_dict(), strict=False)
    assert distance(run([Control(plain, lines(), scale=0.7)], family, task), theirs) > 1e-2, "the change does nothing"


@pytest.mark.parametrize("family", BASES)
def test_the_peer_reads_the_file_but_for_biases(family: str, tmp_path: Path) -> None:
    """diffusers leaves out the biases of layers that have a low-rank pair: they may be the base's or not."""
    whole = made(family)[0]
    own = {original(name): value for name, value in base(family).state_dict().items()}
    changed = {name.removesuffix(".up") + ".bias" for name in whole if name.endswith(".up")}
    neutral = {name: own[name].clone() if name in changed else value for name, value in whole.items()}
    results = []
    for tensors in (whole, neutral):
        net = diffusers.ControlNetModel.from_unet(base(family), conditioning_embedding_out_channels=(8, 8, 16, 16))
        save_file(tensors, tmp_path / "lora.safetensors")
        net.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix=None)
        peer = pipe_of(diffusers, family, controlnet=net)
        results.append(peer(**{**CALL, **TASKS[""], "generator": seeds(1)}, image=lines()).images)
    assert distance(run([Control(ControlLoRA(neutral), lines())], family), results[1]) < 1e-4
    assert distance(results[0], results[1]) < 1e-6
    assert distance(run([Control(lora(family), lines())], family), results[0]) > 1e-2


def test_it_acts_as_a_controlnet_in_all_else() -> None:
    more = {"prompt": ["a red fox", "two boats"], "num_images_per_prompt": 2, "height": 64, "width": 64}
    images, beside = (
        [lines(1), lines(2)],
        Control(make_adapter(channels=(32, 64, 64), downscale=16), lines(3), scale=0.5),
    )
    for fields in (
        {"mode": "prompt"},
        {"scale": [0.2, 0.9, 0.4, 0.7], "mask": half_mask()},
        {"start": 0.25, "end": 0.75},
    ):
        ours, plain = (
            run([Control(model, images, **fields), beside], generator=seeds(1, 2, 3, 4), **more)
            for model in (lora(), made("StableDiffusionXL")[1])
        )
        assert distance(ours, plain) < 1e-5


def test_the_base_stays_as_it_is_and_shares_what_is_not_changed() -> None:
    unet, whole = make_unet(), made("StableDiffusionXL")[0]
    before, flags = copy.deepcopy(unet.state_dict()), [p.requires_grad for p in unet.parameters()]
    processors = dict(unet.attn_processors)
    model = lora()
    run([Control(model, lines())], pipe=pipe_of(diffusion_kit, "StableDiffusionXL", unet=unet))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert [p.requires_grad for p in unet.parameters()] == flags
    assert unet.attn_processors == processors
    own, ours = dict(unet.named_parameters()), dict(model.network(unet).named_parameters())
    changed = {name.removesuffix(".up") + ".weight" for name in whole} | whole.keys()
    shared = {name for name in ours if original(name) not in changed}
    assert len(shared) > 20
    for name, value in ours.items():
        assert (value is own.get(name)) == (name in shared), name


def test_merged_once_until_weights_of_the_base_change() -> None:
    model, unet = lora(), make_unet()
    first = model.network(unet)
    assert model.network(unet) is first
    assert model.network(torch.compile(unet)) is first
    assert model.network(make_unet()) is not first
    weight = unet.mid_block.resnets[0].conv1.weight
    weight.data += 0.01  # as diffusers fuses a LoRA: no version of the tensor tells
    second = model.network(unet)
    assert second is not first
    change = second.mid_block.resnets[0].conv1.weight - first.mid_block.resnets[0].conv1.weight
    assert torch.allclose(change, torch.full_like(change, 0.01), atol=1e-6)
    kept = weakref.ref(second)
    del unet, first, second, weight
    gc.collect()
    assert kept() is None


def test_loras_of_the_base_are_left_out() -> None:
    unet, model = make_unet(), lora()
    plain = model.network(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    with_lora = ControlLoRA(made("StableDiffusionXL")[0]).network(unet)
    assert model.network(unet) is plain
    for (name, one), (_, two) in zip(plain.named_parameters(), with_lora.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_the_bases(dtype: torch.dtype) -> None:
    unet = make_unet().to(dtype)
    half = ControlLoRA({name: value.to(torch.float16) for name, value in made("StableDiffusionXL")[0].items()})
    net, exact = half.network(unet), lora().network(base("StableDiffusionXL"))
    assert {value.dtype for value in net.parameters()} == {dtype}
    for (name, one), (_, two) in zip(net.named_parameters(), exact.named_parameters(), strict=True):
        assert distance(one.float(), two) < 0.02, name


def test_files_and_folders(tmp_path: Path) -> None:
    file, tensors = tmp_path / "control-lora-canny.safetensors", made("StableDiffusionXL")[0]
    save_file(tensors, file)
    for model in (
        ControlLoRA.from_pretrained(file),
        ControlLoRA.from_pretrained(tmp_path),
        load_control_model(file),
        FILES["control_lora"](str(tmp_path), weight_name=file.name, torch_dtype=torch.float64),
    ):
        assert model.shapes == lora().shapes
        assert all(torch.equal(up, lora().pairs[name][0]) for name, (up, _) in model.pairs.items())
    with pytest.warns(UserWarning, match="canny.safetensors expects edges, white on black"):
        run([Control(ControlLoRA.from_pretrained(file), picture().point(lambda _: 255))], num_inference_steps=1)
    data = file.read_bytes()
    for cut in (4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        fails(lambda: ControlLoRA.from_pretrained(tmp_path / "cut.safetensors"), "cut.safetensors is cut short")
    fails(lambda: ControlLoRA.from_pretrained(tmp_path), r"has control-lora.*, cut.safetensors: say weight_name=")
    fails(lambda: ControlLoRA.from_pretrained("owner/name"), "weight_name is None; it must name a .safetensors file")
    with pytest.raises(FileNotFoundError, match=r"no model '.*other.safetensors'"):
        ControlLoRA.from_pretrained(tmp_path, weight_name="other.safetensors")


def fails(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_errors_say_what_is_wrong() -> None:
    tensors, xl, sd = made("StableDiffusionXL")[0], base("StableDiffusionXL"), base("StableDiffusion")

    def less(*names: str) -> ControlLoRA:
        return ControlLoRA({name: value for name, value in tensors.items() if name not in names}, "a.safetensors")

    fails(lambda: less("lora_controlnet"), "a.safetensors is no Control-LoRA: it has no lora_controlnet$")
    fails(
        lambda: ControlLoRA(xl.state_dict()), "is no Control-LoRA: it has no lora_controlnet, input_hint_block.0.weight"
    )
    fails(
        lambda: less("middle_block.1.proj_in.up"),
        "no whole Control-LoRA: it has no mid_block.attentions.0.proj_in.lora_B",
    )
    fails(
        lambda: less("zero_convs.3.0.bias").network(xl),
        "no whole Control-LoRA: it has no controlnet_down_blocks.3.bias",
    )
    fails(
        lambda: lora().network(sd),
        r"does not fit the base: its .*proj_in.weight is \(64, 64\), the base's is \(64, 64, 1, 1\)",
    )
    fails(
        lambda: less("input_blocks.3.0.op.bias"), r"whole Control-LoRA: its input_blocks.3.0.op.\w+ has no place in one"
    )
    more = {**tensors, "output_blocks.0.0.in_layers.0.weight": torch.zeros(1)}
    fails(lambda: ControlLoRA(more), "its output_blocks.0.0.in_layers.0.weight has no place in one")
    wide = {**tensors, "zero_convs.0.0.weight": torch.zeros(9, 9, 1, 1)}
    fails(lambda: ControlLoRA(wide).network(xl), r"its controlnet_down_blocks.0.weight is \(9, 9, 1, 1\)")
    fails(lambda: less("input_hint_block.4.weight"), "it has no 'controlnet_cond_embedding.blocks.1.weight'")
    narrow = make_unet(cross_attention_dim=32)
    fails(lambda: lora().network(narrow), r"attn2.to_k.weight is \(64, 48\), the base's is \(64, 32\)")
    bare = make_unet(addition_embed_type=None)
    fails(lambda: lora().network(bare), r"its add_embedding.linear_1.weight is \(128, 80\), the base has none")
    offloaded, quantised = make_unet(), make_unet()
    offloaded.conv_in.to("meta")
    fails(lambda: lora().network(offloaded), "UNet's conv_in.weight is offloaded: load it whole")
    layer = (wrapped := make_unet()).conv_in
    layer.weight = torch.nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    fails(lambda: lora().network(wrapped), r"UNet's conv_in.weight is quantised \(TwoTensor\): load it whole")
    quantised.conv_in.weight = torch.nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
    fails(lambda: lora().network(quantised), r"UNet's conv_in.weight is quantised \(torch.uint8\): load it whole")


def test_a_file_that_comes_with_a_base_is_found_by_name_and_saved_with_it(tmp_path: Path) -> None:
    pipe = pipe_of(diffusion_kit, "StableDiffusionXL")
    pipe.save_pretrained(tmp_path / "base")
    folder = tmp_path / "base" / "controls" / "edges"
    folder.mkdir(parents=True)
    save_file(made("StableDiffusionXL")[0], folder / "control_lora.safetensors")
    own = type(pipe).from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    assert own.control_names == ["edges"]
    named, given = (run([Control(model, lines())], pipe=own) for model in ("edges", lora()))
    assert torch.equal(named, given)
    for place in ("again", "base"):
        own.save_pretrained(tmp_path / place)
        again = type(pipe).from_pretrained(tmp_path / place, torch_dtype=torch.float32)
        assert torch.equal(run([Control("edges", lines())], pipe=again), given)
