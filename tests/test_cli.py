"""The command line, with a small random-weight model: what it writes, what it says, how it exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import lines, make_adapter, make_controlnet, picture, pipeline
from PIL import Image

from diffusion_kit import SDXLPipeline
from diffusion_kit.cli import main, parse_control


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    pipeline(SDXLPipeline).save_pretrained(path)
    make_adapter().save_pretrained(path / "controls" / "canny")
    make_controlnet().save_pretrained(path / "more" / "net")
    return path


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture(size=96).save("photo.png")
    lines().save("lines.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    Path("text.png").write_text("no picture")
    return tmp_path


def run(model: Path, *arguments: Any) -> int:
    common = ["--model", model, "--steps", 2, "--seed", 1]
    return main([str(a) for a in ("generate", "a red fox", *common, *arguments)])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_every_task_and_mixture_writes_its_own_picture(model: Path, work: Path) -> None:
    variants: dict[str, list[Any]] = {
        "plain": [],
        "canny": ["--control", "canny=photo.png"],
        "line": ["--control", "canny=lines.png,detect=none,scale=0.5,end=0.5,mask=mask.png"],
        "net": ["--control", f"{model}/more/net=photo.png,detect=canny", "--control", "canny=lines.png"],
        "image": ["--image", "photo.png", "--strength", "0.9"],
        "inpaint": ["--image", "photo.png", "--mask", "mask.png", "--control", "canny=photo.png"],
        "scheduler": ["--scheduler", "DDIMScheduler", "--negative-prompt", "bad", "--guidance-scale", "2"],
    }
    for name, arguments in variants.items():
        assert run(model, *arguments, "--out", f"{name}.png") == 0
    results = [pixels(f"{name}.png") for name in variants]
    assert all(result.shape == (64, 64, 3) for result in results)
    for k, result in enumerate(results):
        assert result.std() > 2
        assert all(np.abs(result - other).mean() > 0.5 for other in results[:k])
    assert not list(work.glob(".*"))


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_count(model: Path, work: Path) -> None:
    assert run(model, "--count", 2, "--out", "many.png") == 0
    assert run(model, "--out", "one.png") == 0
    assert np.abs(pixels("many-1.png") - pixels("one.png")).max() <= 1
    assert np.abs(pixels("many-2.png") - pixels("one.png")).mean() > 0.5


def test_a_name_that_is_free_is_chosen(model: Path, work: Path) -> None:
    for _ in range(2):
        assert run(model) == 0
    assert Path("picture.png").exists()
    assert Path("picture_2.png").exists()


def test_the_shape_of_the_picture_is_kept(model: Path, work: Path) -> None:
    picture(size=128).crop((0, 0, 128, 64)).save("wide.png")
    assert run(model, "--control", "canny=wide.png", "--out", "a.png") == 0
    width, height = Image.open("a.png").size
    assert width / height == pytest.approx(2, rel=0.15)
    assert run(model, "--control", "canny=wide.png", "--size", "64x96", "--out", "b.png") == 0
    assert Image.open("b.png").size == (64, 96)


BAD: dict[str, tuple[list[str], str]] = {
    "control_form": (["--control", "canny"], "must be KIND=IMAGE"),
    "control_option": (["--control", "canny=photo.png,scal=1"], "no option 'scal'"),
    "control_number": (["--control", "canny=photo.png,scale=big"], "scale='big' must be a number"),
    "control_window": (["--control", "canny=photo.png,start=0.8,end=0.2"], "0 <= start <= end <= 1"),
    "control_name": (["--control", "depth=photo.png"], "no control 'depth' comes with the base (it has canny)"),
    "control_file": (["--control", "canny=none.png"], "no image file none.png"),
    "control_detector": (["--control", "canny=photo.png,detect=magic"], "no detector 'magic'"),
    "control_folder": (["--control", "./none=photo.png"], "no model './none'"),
    "not_a_picture": (["--image", "text.png"], "text.png is not a PNG"),
    "mask_alone": (["--mask", "mask.png"], "--mask needs --image"),
    "strength_alone": (["--strength", "0.5"], "--strength needs --image"),
    "strength": (["--image", "photo.png", "--strength", "-1"], "strength is -1"),
    "steps": (["--steps", "0"], "num_inference_steps is 0"),
    "size": (["--size", "big"], "--size is 'big'"),
    "odd_size": (["--size", "63x64"], "multiples of 4"),
    "count": (["--count", "0"], "--count is 0"),
    "scheduler": (["--scheduler", "EulerDiscretScheduler"], "did you mean EulerDiscreteScheduler"),
    "device": (["--device", "abacus"], "no device 'abacus'"),
    "out_folder": (["--out", "none/a.png"], "no folder none"),
    "out_format": (["--out", "a.tiff"], "must end in .png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name: str, model: Path, work: Path, capsys: Any) -> None:
    arguments, message = BAD[name]
    before = sorted(work.iterdir())
    assert run(model, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert sorted(work.iterdir()) == before


def test_a_missing_model(work: Path, capsys: Any) -> None:
    assert main(["generate", "a fox", "--model", "./nowhere"]) == 2
    assert "no model './nowhere'" in capsys.readouterr().err


def test_a_failure_is_exit_code_1_and_leaves_no_file(
    model: Path, work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    before = sorted(work.iterdir())
    assert run(model, "--out", "a.png") == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(work.iterdir()) == before


def test_debug_shows_the_traceback(model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--steps", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate"])
    assert caught.value.code == 2


def test_parse_control_takes_commas_in_file_names() -> None:
    spec = parse_control("canny=a,b.png,scale=0.5,detect=none")
    assert spec == {"kind": "canny", "image": "a,b.png", "scale": 0.5, "detect": "none"}
