"""What a file is, by its header: lists of names and shapes of every kind; loading them; files that are damaged."""

from __future__ import annotations

import json
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import distance, lines, make_adapter, make_controlnet, make_unet, pipeline, randomise, seeds
from safetensors.torch import save_file

from diffusion_kit import Control, SDXLPipeline
from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.cli import main
from diffusion_kit.models.formats import Format, describe, identify
from diffusion_kit.models.sources import tensor_shapes

FOLDER = Path(__file__).parent / "formats"
sys.path.insert(0, str(FOLDER.parents[1] / "scripts"))
from make_format_lists import renamed, tencent  # noqa: E402

SD1, SD2, XL = "SD 1.x", "SD 2.x", "SDXL"
EXPECTED = {
    "checkpoint_refiner": Format("checkpoint", "original", "SDXL's refiner"),
    "checkpoint_sdxl_inpainting": Format("checkpoint", "original", f"{XL}, inpainting"),
    "checkpoint_with_controlnet": Format("controlnet", "original", SD1),
    "unet_refiner_diffusers": Format("unet", "diffusers", "SDXL's refiner"),
    "unet_sdxl_inpainting_diffusers": Format("unet", "diffusers", f"{XL}, inpainting"),
    "unet_sd1_original": Format("unet", "original", SD1),
    "textual_inversion_sd2_diffusers": Format("textual_inversion", "diffusers", SD2),
    "lycoris": Format("lycoris", "LyCORIS"),
    "lllite": Format("lllite", "kohya"),
    "t2i_adapter_odd": Format("t2i_adapter", "diffusers"),
    "checkpoint_sd1": Format("checkpoint", "original", SD1),
    "checkpoint_sd1_inpainting": Format("checkpoint", "original", f"{SD1}, inpainting"),
    "checkpoint_sd1_instruct": Format("checkpoint", "original", f"{SD1}, instruct-pix2pix"),
    "checkpoint_sd2": Format("checkpoint", "original", SD2),
    "checkpoint_sdxl": Format("checkpoint", "original", XL),
    "control_lora_sd1": Format("control_lora", "Stability", SD1),
    "control_lora_sdxl": Format("control_lora", "Stability", XL),
    "controlnet_sd1_bare": Format("controlnet", "original", SD1),
    "controlnet_sd1_diffusers": Format("controlnet", "diffusers", SD1),
    "controlnet_sd1_original": Format("controlnet", "original", SD1),
    "controlnet_sd2_diffusers": Format("controlnet", "diffusers", SD2),
    "controlnet_sd2_original": Format("controlnet", "original", SD2),
    "controlnet_sdxl_diffusers": Format("controlnet", "diffusers", XL),
    "controlnet_sdxl_original": Format("controlnet", "original", XL),
    "controlnet_union_sdxl": Format("controlnet_union", "diffusers", XL),
    "ip_adapter_sd1_faceid": Format("ip_adapter", "FaceID", SD1),
    "ip_adapter_sd1_full": Format("ip_adapter", "full-face", SD1),
    "ip_adapter_sd1_plain": Format("ip_adapter", "plain", SD1),
    "ip_adapter_sd1_plus": Format("ip_adapter", "plus", SD1),
    "ip_adapter_sdxl_faceid": Format("ip_adapter", "FaceID", XL),
    "ip_adapter_sdxl_full": Format("ip_adapter", "full-face", XL),
    "ip_adapter_sdxl_plain": Format("ip_adapter", "plain", XL),
    "ip_adapter_sdxl_plus": Format("ip_adapter", "plus", XL),
    "lora_sd1_kohya": Format("lora", "kohya", SD1),
    "lora_sd1_peft": Format("lora", "peft", SD1),
    "lora_sdxl_kohya": Format("lora", "kohya", XL),
    "lora_sdxl_peft": Format("lora", "peft", XL),
    "movq": Format("movq", "diffusers"),
    "prior_21": Format("prior", "diffusers", "Kandinsky 2.1"),
    "prior_22": Format("prior", "diffusers", "Kandinsky 2.2"),
    "somebody_elses": Format("unknown"),
    "t2i_adapter_sd1_full_diffusers": Format("t2i_adapter", "diffusers", SD1),
    "t2i_adapter_sd1_full_tencent": Format("t2i_adapter", "TencentARC", SD1),
    "t2i_adapter_sd1_grey_diffusers": Format("t2i_adapter", "diffusers", SD1),
    "t2i_adapter_sd1_grey_tencent": Format("t2i_adapter", "TencentARC", SD1),
    "t2i_adapter_sd1_light_diffusers": Format("t2i_adapter", "diffusers", SD1),
    "t2i_adapter_sd1_light_tencent": Format("t2i_adapter", "TencentARC", SD1),
    "t2i_adapter_sdxl_full_diffusers": Format("t2i_adapter", "diffusers", XL),
    "t2i_adapter_sdxl_full_tencent": Format("t2i_adapter", "TencentARC", XL),
    "textual_inversion_sd1": Format("textual_inversion", "AUTOMATIC1111", SD1),
    "textual_inversion_sdxl": Format("textual_inversion", "SDXL", XL),
    "unet_kandinsky21": Format("unet", "diffusers", "Kandinsky 2.1"),
    "unet_kandinsky22": Format("unet", "diffusers", "Kandinsky 2.2"),
    "unet_kandinsky22_hint": Format("unet", "diffusers", "Kandinsky 2.2, with a hint"),
    "unet_kandinsky3": Format("unet", "diffusers", "Kandinsky 3"),
    "unet_sd1_diffusers": Format("unet", "diffusers", SD1),
    "unet_sd1_inpainting_diffusers": Format("unet", "diffusers", f"{SD1}, inpainting"),
    "unet_sd1_instruct_diffusers": Format("unet", "diffusers", f"{SD1}, instruct-pix2pix"),
    "unet_sd2_diffusers": Format("unet", "diffusers", SD2),
    "unet_sdxl_diffusers": Format("unet", "diffusers", XL),
    "vae_diffusers": Format("vae", "diffusers"),
    "vae_original": Format("vae", "original"),
}


def header_of(name: str) -> tuple[dict[str, Any], int]:
    """A safetensors header of float16 tensors and the bytes of data that it claims."""
    header, end = {}, 0
    for line in (FOLDER / f"{name}.txt").read_text().splitlines()[1:]:
        tensor, _, text = line.rpartition(" ")
        shape = [] if text == "scalar" else [int(side) for side in text.split("x")]
        size = 2 * int(torch.Size(shape).numel())
        header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end


def written(file: Path, header: Any, size: int) -> Path:
    """A file with that header over a hole of `size` bytes: nothing of it is on the disk."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + size)
    return file


def test_there_is_a_list_for_every_expectation() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_known_by_its_header(name: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file.safetensors", *header_of(name))
    assert identify(file) == EXPECTED[name]
    line = describe(file)
    assert "\n" not in line
    assert EXPECTED[name].base is None or EXPECTED[name].base in line
    assert EXPECTED[name].layout in line


def test_inspect_says_it_in_a_line(tmp_path: Path, capsys: Any) -> None:
    file = written(tmp_path / "depth.safetensors", *header_of("t2i_adapter_sdxl_full_tencent"))
    assert main(["models", "inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a T2I-Adapter (TencentARC) for SDXL: ")
    assert out.count("\n") == 1
    assert f"Control({str(file)!r}, image)" in out
    assert main(["models", str(file)]) == 0
    assert "T2I-Adapter" in capsys.readouterr().out


# Loading


@cache
def published() -> Any:
    """A UNet with what shapes do not tell as published ones have it: heads 64 wide, 32 groups, sizes in 256 numbers."""
    return make_unet(
        block_out_channels=(64, 128, 128),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=32,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=32 + 6 * 256,
    )


def nets() -> dict[str, Any]:
    """Networks with their tensors as files have them."""
    full, light = (
        make_adapter(kind="full_adapter", downscale=8),
        make_adapter(kind="light_adapter", channels=(32, 64, 64)),
    )
    xl = randomise(diffusers.T2IAdapter(1, [32, 64, 64, 64], 2, 16, "full_adapter_xl"), 3)
    controlnet = make_controlnet(of=published())
    return {
        "full": (full, full.state_dict()),
        "full_tencent": (full, tencent(full.state_dict(), 1)),
        "light": (light, light.state_dict()),
        "light_tencent": (light, tencent(light.state_dict())),
        "xl_tencent": (xl, tencent(xl.state_dict())),
        "controlnet": (controlnet, controlnet.state_dict()),
        "controlnet_original": (controlnet, renamed(controlnet.state_dict(), "control_model.")),
        "controlnet_bare": (controlnet, renamed(controlnet.state_dict())),
    }


@pytest.mark.parametrize("name", ["full", "full_tencent", "light", "light_tencent", "xl_tencent"])
def test_t2i_adapters_load_from_a_file(name: str, tmp_path: Path) -> None:
    net, tensors = nets()[name]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "net.safetensors")
    loaded = load_control_model(tmp_path / "net.safetensors")
    assert type(loaded) is diffusers.T2IAdapter
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in net.config.items() if k[0] != "_"
    }
    image = torch.rand(1, net.config.in_channels, 64, 64, generator=seeds(1))
    assert all(distance(a, b) < 1e-5 for a, b in zip(loaded(image), net(image), strict=True))
    assert load_control_model(tmp_path / "net.safetensors", torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("name", ["controlnet", "controlnet_original", "controlnet_bare"])
def test_controlnets_load_from_a_file(name: str, tmp_path: Path) -> None:
    net, tensors = nets()[name]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "net.safetensors")
    loaded = load_control_model(tmp_path / "net.safetensors")
    assert type(loaded) is diffusers.ControlNetModel
    pipe = pipeline(SDXLPipeline, unet=published())
    call = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "latent"}
    made = [pipe(**call, controls=[Control(n, lines())], generator=seeds(1)).images for n in (loaded, net)]
    assert distance(*made) < 1e-4
    by_path = pipe(**call, controls=[Control(str(tmp_path / "net.safetensors"), lines())], generator=seeds(1)).images
    assert torch.equal(by_path, made[0])
    assert distance(pipe(**call, generator=seeds(1)).images, made[0]) > 1e-2


def test_the_file_that_is_named_is_loaded_whatever_lies_beside_it(tmp_path: Path) -> None:
    """Published repositories have several networks in one folder, with the configuration of one of them."""
    net, tensors = nets()["controlnet_original"]
    make_adapter().save_pretrained(tmp_path)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "net.safetensors")
    assert type(load_control_model(tmp_path / "net.safetensors")) is diffusers.ControlNetModel
    assert type(load_control_model(tmp_path / "diffusion_pytorch_model.safetensors")) is diffusers.T2IAdapter
    net.save_pretrained(tmp_path / "halves", variant="fp16")
    assert type(load_control_model(tmp_path / "halves/diffusion_pytorch_model.fp16.safetensors")) is type(net)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_sdxl_kohya", r"is no control of this version: it is a LoRA \(kohya\) for SDXL.*load_lora_weights"),
        ("checkpoint_sd1", "it is a whole model"),
        ("ip_adapter_sd1_faceid", "needs insightface"),
        ("lllite", "which this version does not load"),
        ("unet_refiner_diffusers", "a UNet"),
        ("somebody_elses", "tensors of no kind that is known, the first is layers"),
        ("unet_kandinsky22_hint", "a UNet .* of Kandinsky 2.2, with a hint"),
    ],
)
def test_a_file_that_is_no_control_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file.safetensors", *header_of(name))
    with pytest.raises(ValueError, match=message) as error:
        load_control_model(file)
    assert "\n" not in str(error.value)


def test_a_tensor_too_few_is_one_line(tmp_path: Path) -> None:
    for net in (make_adapter(), make_controlnet()):
        tensors = dict(net.state_dict())
        gone = next(name for name in reversed(tensors) if name.endswith("bias"))
        del tensors[gone]
        save_file(tensors, tmp_path / "net.safetensors")
        with pytest.raises(ValueError, match=f"is no .*: (it has no )?.*{gone}") as error:
            load_control_model(tmp_path / "net.safetensors")
        assert "\n" not in str(error.value)


def test_a_file_beside_its_configuration_loads_by_it(tmp_path: Path) -> None:
    """A full adapter and SDXL's have tensors of the same shapes."""
    net = make_adapter()
    assert net.config.adapter_type == "full_adapter_xl"
    net.save_pretrained(tmp_path, safe_serialization=True)
    loaded = load_control_model(next(tmp_path.glob("*.safetensors")))
    assert loaded.config.adapter_type == "full_adapter_xl" == load_control_model(tmp_path).config.adapter_type


def test_an_odd_adapter_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(
        {"adapter.conv_in.weight": torch.zeros(8, 100, 3, 3), "adapter.body.0.resnets.0.block1.weight": torch.zeros(1)},
        file,
    )
    with pytest.raises(ValueError, match="is no T2I-Adapter that is known without its config.json") as error:
        load_control_model(file)
    assert "\n" not in str(error.value)


# Damage


def damaged(tmp_path: Path) -> dict[str, Path]:
    header, size = header_of("textual_inversion_sd1")
    whole = written(tmp_path / "whole.safetensors", header, size).read_bytes()
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    end = {"dtype": "F16", "shape": [4, 768], "data_offsets": [0, size * 2]}
    contents = {
        "empty": b"",
        "length_only": whole[:8],
        "half_a_length": whole[:5],
        "half_a_header": whole[: head // 2],
        "no_data": whole[:head],
        "half_the_data": whole[: head + size // 2],
        "header_beyond_the_file": struct.pack("<Q", 10**6) + whole[8:],
        "enormous_header": struct.pack("<Q", 2**62) + whole[8:],
        "no_json": struct.pack("<Q", 10) + b"not json!!" + whole,
        "more_than_it_holds": written(tmp_path / "a.safetensors", {"emb_params": end}, size).read_bytes(),
        "shape_beyond_the_data": written(
            tmp_path / "b.safetensors", {"emb_params": {**header["emb_params"], "shape": [9, 768]}}, size
        ).read_bytes(),
        "overlapping": written(
            tmp_path / "c.safetensors", {**header, "other": header["emb_params"]}, size
        ).read_bytes(),
        "too_much_data": whole + b"more",
        "a_picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    return {name: tmp_path / f"{name}.safetensors" for name in contents}


def test_damaged_files_are_one_line(tmp_path: Path, capsys: Any) -> None:
    for name, file in damaged(tmp_path).items():
        for read in (tensor_shapes, identify, load_control_model):
            with pytest.raises(ValueError, match="is cut short, or no safetensors file") as error:
                read(file)
            assert "\n" not in str(error.value), name
        assert main(["models", "inspect", str(file)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1, name
        assert str(file) in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "give one model, or inspect and one .safetensors file"),
        (["inspect", "a", "b"], "give one model, or inspect and one"),
        (["a", "b"], "give one model, or inspect and one"),
        (["inspect", "none.safetensors"], "no model 'none.safetensors'"),
        (["inspect", "."], "is no file: `diffusion-kit models .`"),
        (["inspect", "net.ckpt"], "is a pickle"),
    ],
)
def test_inspect_of_something_else_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.ckpt").write_bytes(b"x")
    assert main(["models", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
