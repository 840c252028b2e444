"""Folders of the kit load in diffusers and the other way round; what is refused at loading."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import (
    components,
    half_mask,
    light,
    lines,
    make_adapter,
    make_controlnet,
    make_unet,
    make_vae,
    picture,
    pipeline,
    seeds,
)

import diffusion_kit
from diffusion_kit import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, SDXLPipeline

PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StableDiffusionXLPipeline": ({}, {}),
    "StableDiffusionXLImg2ImgPipeline": ({}, {"image": picture(), "strength": 0.9}),
    "StableDiffusionXLInpaintPipeline": (
        {},
        {"image": picture(), "mask_image": half_mask(), "height": 64, "width": 64},
    ),
    "StableDiffusionXLAdapterPipeline": ({"adapter": make_adapter}, {"image": lines()}),
    "StableDiffusionXLControlNetPipeline": ({"controlnet": make_controlnet}, {"image": lines()}),
    "StableDiffusionXLControlNetImg2ImgPipeline": (
        {"controlnet": make_controlnet},
        {"image": picture(), "control_image": lines()},
    ),
    "StableDiffusionXLControlNetInpaintPipeline": (
        {"controlnet": make_controlnet},
        {"image": picture(), "control_image": lines(), "mask_image": half_mask()},
    ),
}


def result(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a fox", num_inference_steps=3, generator=seeds(1), output_type="latent", **call).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SDXL base."""
    path = tmp_path_factory.mktemp("base")
    pipeline(SDXLPipeline).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", light(PARTS, *list(PARTS)[::3]))
def test_both_ways(name: str, tmp_path: Path) -> None:
    parts, call = PARTS[name]
    made = {key: make() for key, make in parts.items()}
    ours, theirs = (pipeline(getattr(module, name), **made) for module in (diffusion_kit, diffusers))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    indexes = [json.loads((tmp_path / who / "model_index.json").read_text()) for who in ("ours", "theirs")]
    assert indexes[0]["_class_name"] == indexes[1]["_class_name"] == name
    assert {k: v for k, v in indexes[0].items() if isinstance(v, list)} == {
        k: v for k, v in indexes[1].items() if isinstance(v, list)
    }
    expected = result(theirs, call)
    for loaded in (
        getattr(diffusers, name).from_pretrained(tmp_path / "ours"),
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours"),
        getattr(diffusion_kit, name).from_pretrained(tmp_path / "theirs"),
    ):
        torch.testing.assert_close(result(loaded, call), expected, rtol=1e-3, atol=1e-3)


def test_the_family_says_the_peers_name(folder: Path) -> None:
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    assert type(AutoPipelineForText2Image.from_pretrained(folder)) is SDXLPipeline


def test_auto_pipeline_with_adapters(folder: Path) -> None:
    adapter, net = make_adapter(), make_controlnet()
    made = AutoPipelineForText2Image.from_pretrained(folder, adapter=adapter)
    assert type(made) is diffusion_kit.StableDiffusionXLAdapterPipeline
    expected = {
        AutoPipelineForText2Image: "StableDiffusionXLControlNetPipeline",
        AutoPipelineForImage2Image: "StableDiffusionXLControlNetImg2ImgPipeline",
        AutoPipelineForInpainting: "StableDiffusionXLControlNetInpaintPipeline",
    }
    for auto, name in expected.items():
        assert type(auto.from_pretrained(folder, controlnet=net)).__name__ == name
    with pytest.raises(ValueError, match="takes no adapter="):
        AutoPipelineForImage2Image.from_pretrained(folder, adapter=adapter)


def test_from_pipe_shares_the_components() -> None:
    peer = pipeline(diffusers.StableDiffusionXLPipeline)
    family = AutoPipelineForImage2Image.from_pipe(peer)
    assert type(family) is SDXLPipeline
    assert family.unet is peer.unet
    controlled = AutoPipelineForText2Image.from_pipe(family, controlnet=make_controlnet())
    assert controlled.unet is peer.unet
    assert type(controlled) is diffusion_kit.StableDiffusionXLControlNetPipeline
    assert AutoPipelineForInpainting.from_pipe(controlled).controlnet is controlled.controlnet


def test_from_pipe_leaves_number_types_as_they_are() -> None:
    """The networks are the other pipeline's, too."""
    half = pipeline(SDXLPipeline, **copy.deepcopy({**components(), "unet": make_unet().to(torch.bfloat16)}))
    again = AutoPipelineForImage2Image.from_pipe(half)
    assert again.unet is half.unet
    assert half.unet.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    told = SDXLPipeline.from_pipe(half, dtype=torch.bfloat16, vae=make_vae())
    assert told.vae.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32


def test_controls_that_come_with_a_base(folder: Path, tmp_path: Path) -> None:
    import shutil

    from diffusion_kit import Control

    base = shutil.copytree(folder, tmp_path / "base")
    adapter = make_adapter()
    adapter.save_pretrained(base / "controls" / "edges")
    pipe = AutoPipelineForText2Image.from_pretrained(base)
    assert pipe.control_names == ["edges"]
    named, given = (result(pipe, {"controls": [Control(model, lines())]}) for model in ("edges", adapter))
    assert torch.equal(named, given)


def test_controls_of_a_base_are_saved_with_it_and_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base = shutil.copytree(folder, tmp_path / "base")
    make_adapter().save_pretrained(base / "controls" / "edges")
    monkeypatch.chdir(tmp_path)
    SDXLPipeline.from_pretrained("base").save_pretrained(tmp_path / "again")
    assert "_name_or_path" not in json.loads((tmp_path / "again" / "model_index.json").read_text())
    pipe = SDXLPipeline.from_pretrained("./again")
    monkeypatch.chdir(base)
    assert pipe.control_names == ["edges"]
    assert pipeline(SDXLPipeline).control_names == [], "a folder that happens to be here is not the base's"


def test_a_control_by_its_path(tmp_path: Path) -> None:
    from diffusion_kit import Control

    adapter = make_adapter()
    adapter.save_pretrained(tmp_path / "edges")
    pipe = pipeline(SDXLPipeline)
    by_path, given = (result(pipe, {"controls": [Control(m, lines())]}) for m in (str(tmp_path / "edges"), adapter))
    assert torch.equal(by_path, given)
    with pytest.raises(FileNotFoundError, match="./nowhere"):
        result(pipe, {"controls": [Control("./nowhere", lines())]})


def break_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, **changes}))


def missing(path: Path) -> None:
    import shutil

    shutil.rmtree(path / "tokenizer")


def outside(path: Path) -> None:
    import shutil

    shutil.move(path / "vae", path.parent / "elsewhere")
    os.symlink(path.parent / "elsewhere", path / "vae")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (missing, FileNotFoundError, "no 'tokenizer'"),
        (outside, ValueError, "leads outside the model folder"),
        (lambda p: break_index(p, unet=["os", "system"]), ValueError, "from the module 'os'"),
        (lambda p: (p / "model_index.json").write_text("{"), ValueError, "not valid JSON"),
        (lambda p: (p / "model_index.json").unlink(), FileNotFoundError, "no model_index.json"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(
    damage: Any, error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(error, match=message) as caught:
        SDXLPipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./no/such/folder", FileNotFoundError, "no model './no/such/folder'"),
        ("owner/name", FileNotFoundError, "'owner/name'"),
        ("model.ckpt", ValueError, "is a pickle"),
    ],
)
def test_a_missing_model_is_one_clear_line(source: str, error: type[Exception], message: str) -> None:
    for load in (AutoPipelineForText2Image.from_pretrained, SDXLPipeline.from_pretrained):
        with pytest.raises(error, match=message) as caught:
            load(source)
        assert "\n" not in str(caught.value)


def test_a_pickle_inside_a_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(components()["unet"].state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        SDXLPipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_remote_code_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code is refused"):
        SDXLPipeline.from_pretrained(folder, trust_remote_code=True)
