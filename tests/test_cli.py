"""The command line, with small random-weight models: what it writes, what it says, how it exits."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import light, lines, make_adapter, picture, sd_pipeline
from PIL import Image
from test_union import union

from diffusion_kit import SD15Pipeline
from diffusion_kit.cli import main
from diffusion_kit.commands.jobs import pair, parse_control
from diffusion_kit.recipes import Recipe, read


@pytest.fixture(scope="module")
def sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd")
    sd_pipeline(SD15Pipeline).save_pretrained(path)
    make_adapter(kind="full_adapter", channels=(32, 64, 64), downscale=4).save_pretrained(path / "controls" / "canny")
    return path


def run(model: Path, *arguments: Any) -> int:
    common = ["--model", model, "--steps", 3, "--seed", 1]
    return main([str(a) for a in ("generate", "a red fox", *common, *arguments)])


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


TASKS: dict[str, list[str]] = {
    "text": [],
    "image": ["--image", "photo.png", "--strength", "0.9"],
    "inpaint": ["--image", "photo.png", "--mask", "half.png"],
}
MIXTURES: dict[str, list[str]] = {
    "plain": [],
    "canny": ["--control", "canny=photo.png"],
    "lines": ["--control", "canny=lines.png,detect=none,scale=0.5:0.6:0.7:0.8,end=0.5,mask=half.png,mode=prompt"],
    "both": ["--control", "NET=photo.png,detect=sketch,start=0.1", "--control", "canny=lines.png"],
    "guided": ["--control", "canny=photo.png,guidance=3"],
}


def mixture(name: str, model: Path) -> list[str]:
    return [text.replace("NET", f"{model}/more/net") for text in MIXTURES[name]]


@pytest.fixture
def half(work: Path) -> None:
    Image.fromarray(np.repeat(np.repeat([[255, 0]], 40, 0), 20, 1).astype(np.uint8)).save("half.png")


EVERY = list(product(TASKS, MIXTURES))
A_FEW = [*(pair for pair in EVERY if pair[0] == "text"), ("image", "lines"), ("inpaint", "both")]


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("pairs", light([EVERY, A_FEW], A_FEW))
def test_every_task_and_mixture_writes_its_own_picture_and_the_same_again(
    pairs: list[tuple[str, str]], model: Path, work: Path
) -> None:
    results = []
    for task, name in pairs:
        assert run(model, *TASKS[task], *mixture(name, model), "--out", f"{task}-{name}.png") == 0
        results.append(pixels(f"{task}-{name}.png"))
        if name in ("lines", "both"):
            assert main(["generate", "--again", f"{task}-{name}.png", "--out", "again.png"]) == 0
            assert np.array_equal(pixels("again.png"), results[-1])
    for k, result in enumerate(results):
        assert result.shape == (64, 64, 3)
        assert result.std() > 2
        assert all(np.abs(result - other).mean() > 0.5 for other in results[:k])
    assert not list(work.glob(".*"))


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_again_from_other_formats_and_other_settings(suffix: str, sd_model: Path, work: Path) -> None:
    more = ["--scheduler", "DDIMScheduler", "--guidance-scale", 3, "--negative-prompt", "bad", "--fit", "contain"]
    more += ["--control", "canny=photo.png", "--size", "96x64", *TASKS["inpaint"]]
    assert run(sd_model, *more, "--out", f"a.{suffix}") == 0
    assert main(["generate", "--again", f"a.{suffix}", "--out", f"b.{suffix}"]) == 0
    assert np.array_equal(pixels(f"a.{suffix}"), pixels(f"b.{suffix}"))
    assert pixels(f"a.{suffix}").shape == (64, 96, 3)
    recipe = read(f"a.{suffix}")
    assert isinstance(recipe, Recipe)
    assert (recipe.scheduler, recipe.fit, recipe.negative_prompt) == ("DDIMScheduler", "contain", "bad")


def test_steps_and_guidance_are_by_default_the_cards(model: Path, work: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(model, work / "copy"))

    def used(*arguments: Any) -> tuple[int, float]:
        assert main(["generate", "a red fox", "--model", str(copy), "--seed", "1", "--out", "a.png", *arguments]) == 0
        recipe = read("a.png")
        assert isinstance(recipe, Recipe)
        return recipe.steps, recipe.guidance_scale

    assert used() == (30, 5.0)
    (copy / "README.md").write_text("---\nnum_inference_steps: 2\nguidance_scale: 2.5\n---\n")
    assert used() == (2, 2.5)
    assert used("--guidance-scale", "3") == (2, 3.0)
    assert used("--steps", "3") == (3, 2.5)
    (copy / "README.md").write_text("---\nguidance_scale: much\n---\n")
    assert main(["generate", "a red fox", "--model", str(copy), "--out", "b.png"]) == 2
    assert "says no steps and guidance" in capsys.readouterr().err


def test_a_variation_changes_what_is_given_and_nothing_else(model: Path, work: Path) -> None:
    assert run(model, "--control", "canny=photo.png", "--out", "a.png") == 0
    assert main(["generate", "a blue boat", "--again", "a.png", "--steps", "4", "--out", "b.png"]) == 0
    first, second = read("a.png"), read("b.png")
    changed = {name for name, value in vars(first).items() if getattr(second, name) != value}
    assert changed == {"prompt", "steps"}
    assert np.abs(pixels("a.png") - pixels("b.png")).mean() > 0.5


def test_embedded_pictures_need_no_files(model: Path, work: Path, capsys: Any) -> None:
    given = ["--image", "photo.png", "--strength", "0.7", "--control", "canny=lines.png"]
    assert run(model, *given, "--embed-controls", "--out", "whole.png") == 0
    assert run(model, *given, "--out", "named.png") == 0
    assert np.array_equal(pixels("whole.png"), pixels("named.png"))
    assert main(["generate", "--again", "named.png", "--embed-controls", "--out", "kept.png"]) == 0
    Path("lines.png").unlink()
    assert main(["generate", "--again", "kept.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("whole.png"), pixels("again.png"))
    assert main(["generate", "--again", "whole.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("whole.png"), pixels("again.png"))
    capsys.readouterr()
    assert main(["generate", "--again", "named.png", "--out", "never.png"]) == 2
    assert "made with lines.png, which is not there any more" in capsys.readouterr().err
    lines(7).save("lines.png")
    assert main(["generate", "--again", "named.png", "--out", "never.png"]) == 2
    assert "lines.png, which has changed since" in capsys.readouterr().err
    assert not Path("never.png").exists()
    assert main(["generate", "--again", "named.png", "--control", "canny=lines.png", "--out", "other.png"]) == 0


def test_a_name_may_be_as_long_as_the_disk_takes(model: Path, work: Path) -> None:
    name = "f" * 251 + ".png"
    assert run(model, "--out", name) == 0
    assert [file.name for file in work.glob("f*")] == [name]


def test_another_model_under_the_same_name_is_told(model: Path, work: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(model, work / "copy"))
    assert run(copy, "--control", "canny=lines.png", "--out", "a.png") == 0
    make_adapter(77).save_pretrained(copy / "controls" / "canny")
    assert main(["generate", "--again", "a.png", "--out", "b.png"]) == 2
    assert "made with the control canny of sha256:" in capsys.readouterr().err
    (copy / "scheduler" / "more.json").write_text("{}")
    assert main(["generate", "--again", "a.png", "--out", "b.png"]) == 2
    assert "give --model to use it all the same" in capsys.readouterr().err
    assert not Path("b.png").exists()


def test_a_control_is_fetched_before_it_is_hashed_and_never_for_an_old_recipe(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id is not in the cache before its first use; a picture from elsewhere must not fetch what it names."""
    from diffusion_kit.commands import shares
    from diffusion_kit.pipelines.base import ControlledPipeline

    events: list[str] = []
    load, digest = ControlledPipeline.load_control, shares.fingerprint
    monkeypatch.setattr(
        ControlledPipeline, "load_control", lambda self, name: (events.append("load"), load(self, name))[1]
    )
    monkeypatch.setattr(shares, "fingerprint", lambda source: (events.append(f"hash {source}"), digest(source))[1])
    net = str(model / "more" / "net")
    assert run(model, "--control", f"{net}=lines.png", "--out", "a.png") == 0
    assert events.index("load") < events.index(f"hash {net}")
    events.clear()
    assert main(["generate", "--again", "a.png", "--out", "b.png"]) == 0
    assert events.index("load") > events.index(f"hash {net}")


def embedded_pixel() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the command."""
    file = tmp_path_factory.mktemp("made") / "a.png"
    assert run(model, "--out", file) == 0
    return file


def hostile(source: str | Path, **changes: Any) -> str:
    """A picture with the recipe of another, changed."""
    from PIL.PngImagePlugin import PngInfo

    recipe = read(source)
    assert isinstance(recipe, Recipe)
    info = PngInfo()
    info.add_itxt("diffusion_kit", json.dumps({**json.loads(recipe.to_json()), **changes}))
    picture().save("hostile.png", pnginfo=info)
    return "hostile.png"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "load"}, "--dtype is 'load'; it must be one of float32"),
        ({"device": "meta"}, "no device 'meta'"),
        ({"steps": 10**9}, "--steps is 1000000000"),
        ({"model": "/usr"}, "/usr is no model: it has no model_index.json, config.json or .safetensors file"),
        ({"model": "owner/name"}, "owner/name is not in the hub's cache"),
        ({"model": "owner/name", "model_hash": None}, "the recipe has no hash of its model owner/name"),
        (
            {"controls": [{"kind": "owner/name", "image": {"path": "x", "sha256": "x", "data": embedded_pixel()}}]},
            "the recipe has no hash of its control owner/name",
        ),
        ({"scheduler": "AutoModel"}, "no scheduler 'AutoModel'"),
        ({"width": 10**6, "height": 10**6}, "at most 64 megapixels are made"),
        ({"image": {"path": "x" * 5000, "sha256": "0"}, "strength": 1.0}, "cannot be read (File name too long)"),
        ({"versions": {"\x1b]0;title\x07": "1"}, "steps": 0}, "--steps is 0"),
    ],
)
def test_a_hostile_recipe_is_one_line(changes: dict, message: str, made: Path, work: Path, capsys: Any) -> None:
    file = hostile(made, **changes)
    assert main(["generate", "--again", file, "--out", "b.png"]) == 2
    assert_one_line(capsys, message)
    assert not Path("b.png").exists()


def test_what_a_recipe_says_cannot_move_the_terminal(model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--out", "a.png") == 0
    assert main(["generate", "--again", hostile("a.png", versions={"\x1b]0;title\x07": "1"}), "--out", "b.png"]) == 0
    said = capsys.readouterr().err
    assert "title" in said
    assert "\x1b]0" not in said


def test_a_moved_model_keeps_the_recipes_scheduler(model: Path, sd_model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--scheduler", "DDIMScheduler", "--out", "a.png") == 0
    moved = shutil.copytree(model, work / "moved")
    assert main(["generate", "--again", "a.png", "--model", str(moved), "--out", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    capsys.readouterr()
    assert main(["generate", "--again", "a.png", "--model", str(sd_model), "--out", "c.png"]) == 0
    assert "its own scheduler is used" in capsys.readouterr().err
    assert read("c.png").scheduler == "EulerDiscreteScheduler"


def test_nothing_that_was_there_or_just_made_is_written_over(model: Path, work: Path) -> None:
    (work / "photos").mkdir()
    picture(1).save("photos/a.png")
    picture(2).save("photos/a.jpg")
    before = Path("photos/a.png").read_bytes()
    assert main(["detect", "canny", "photos", "-o", "photos"]) == 0
    assert Path("photos/a.png").read_bytes() == before
    assert len(list(Path("photos").iterdir())) == 4
    (work / "prompts").mkdir()
    for name in ("a", "a_2"):
        (work / "prompts" / f"{name}.txt").write_text(name)
    (work / "made").mkdir()
    (work / "made" / "a.png").write_text("mine")
    given = ["--prompts", "prompts", "--model", str(model), "--steps", "1", "--out", "made", "--grid", "made"]
    assert main(["generate", *given]) == 0
    assert Path("made/a.png").read_text() == "mine"
    assert len(list(Path("made").iterdir())) == 4, "mine, two pictures and the grid"


def test_what_is_read_is_never_written(model: Path, work: Path, capsys: Any) -> None:
    before = Path("photo.png").read_bytes()
    assert run(model, "--control", "canny=photo.png", "--out", "a.png", "--grid", "photo.png") == 2
    assert run(model, "--out", "b.png") == 0
    made = Path("b.png").read_bytes()
    assert main(["generate", "--again", "b.png", "--out", "b.png"]) == 2
    assert capsys.readouterr().err.count("is a file that this command reads, or writes") == 2
    assert (Path("photo.png").read_bytes(), Path("b.png").read_bytes()) == (before, made)


def test_a_union_is_told_what_its_picture_shows(model: Path, work: Path, capsys: Any) -> None:
    union().save_pretrained(work / "union")
    results = []
    for option in ("detect=canny", "detect=none,type=canny", "detect=canny,type=depth"):
        picture = "lines.png" if "none" in option else "photo.png"
        assert run(model, "--control", f"./union={picture},{option}", "--out", f"{len(results)}.png") == 0
        results.append(pixels(f"{len(results)}.png"))
    assert np.abs(results[0] - results[2]).mean() > 0.2
    assert main(["generate", "--again", "2.png", "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), results[2])
    assert run(model, "--control", "./union=lines.png") == 2
    assert "say which, type=canny or detect=canny" in capsys.readouterr().err


def test_show(model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--control", "canny=photo.png,scale=0.25", "--out", "a.png") == 0
    capsys.readouterr()
    assert main(["show", "a.png"]) == 0
    text = capsys.readouterr().out
    for part in ("a red fox", "canny", "0.25", "photo.png", "EulerDiscreteScheduler", "torch", "sha256"):
        assert part in text
    assert main(["show", "a.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a red fox"


def test_pictures_of_other_programs_can_be_made_with_a_model(model: Path, work: Path, capsys: Any) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters", "a boat\nNegative prompt: fog\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 9, Size: 64x96"
    )
    picture().save("other.png", pnginfo=info)
    assert main(["show", "other.png"]) == 0
    assert "a boat" in capsys.readouterr().out
    assert main(["generate", "--again", "other.png", "--out", "a.png"]) == 2
    assert "AUTOMATIC1111: give --model" in capsys.readouterr().err
    assert main(["generate", "--again", "other.png", "--model", str(model), "--out", "a.png"]) == 0
    recipe = read("a.png")
    found = (recipe.prompt, recipe.negative_prompt, recipe.seed, recipe.steps, recipe.guidance_scale)
    assert found == ("a boat", "fog", 9, 2, 3.0)
    assert pixels("a.png").shape == (96, 64, 3)


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_count(model: Path, work: Path) -> None:
    assert run(model, "--count", 2, "--out", "many.png", "--grid", "grid.png") == 0
    assert run(model, "--out", "one.png") == 0
    assert np.array_equal(pixels("many-1.png"), pixels("one.png"))
    assert np.abs(pixels("many-2.png") - pixels("one.png")).mean() > 0.5
    assert np.array_equal(pixels("grid.png"), np.concatenate([pixels("many-1.png"), pixels("many-2.png")], 1))


def test_folders_are_paired_by_name(model: Path, work: Path, capsys: Any) -> None:
    for name in ("boat", "fox"):
        (work / "prompts").mkdir(exist_ok=True)
        (work / "maps").mkdir(exist_ok=True)
        (work / "prompts" / f"{name}.txt").write_text(f"a {name}\n")
        lines(len(name)).save(work / "maps" / f"{name}.webp", lossless=True)
    common = ["--model", str(model), "--steps", "2", "--seed", "1"]
    given = ["--prompts", "prompts", "--control", "canny=maps,detect=none"]
    assert main(["generate", *given, *common, "--out", "made"]) == 0
    assert sorted(p.name for p in Path("made").iterdir()) == ["boat.png", "fox.png"]
    alone = ["generate", "a fox", "--control", "canny=maps/fox.webp,detect=none", *common, "--out", "alone.png"]
    assert main(alone) == 0
    assert np.array_equal(pixels("made/fox.png"), pixels("alone.png"))
    assert main(["generate", *given, *common, "--out", "made"]) == 0
    assert (work / "made" / "fox_2.png").exists(), "nothing is written over"
    capsys.readouterr()
    (work / "maps" / "cat.png").write_bytes((work / "lines.png").read_bytes())
    assert main(["generate", *given, *common, "--out", "made"]) == 2
    assert "prompts has no cat, which maps has" in capsys.readouterr().err


def test_pairing(work: Path) -> None:
    Path("list.txt").write_text("a fox\n\n  a boat \n")
    assert pair({"--prompts": "list.txt", "--image": "photo.png"}) == {
        "1": {"--prompts": "a fox", "--image": "photo.png"},
        "2": {"--prompts": "a boat", "--image": "photo.png"},
    }
    assert pair({"--image": "photo.png"}) == {"": {"--image": "photo.png"}}
    with pytest.raises(ValueError, match="no such folder or text file"):
        pair({"--prompts": "nowhere"})
    (work / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no pictures"):
        pair({"--image": "empty"})


def test_a_name_that_is_free_is_chosen(model: Path, work: Path) -> None:
    for _ in range(2):
        assert run(model) == 0
    assert Path("picture.png").exists()
    assert Path("picture_2.png").exists()


def test_a_chosen_name_gives_way_to_a_file_that_came_meanwhile(
    model: Path, work: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls in one folder choose the same free name, and only later write there."""
    from diffusion_kit.making import pictures

    make = pictures.make_picture
    monkeypatch.setattr(
        pictures, "make_picture", lambda *given: Path("picture.png").write_text("theirs") and make(*given)
    )
    assert run(model) == 0
    assert "picture_2.png" in capsys.readouterr().out
    assert Path("picture.png").read_text() == "theirs"
    assert run(model, "--out", "picture.png") == 0
    assert pixels("picture.png").shape == pixels("picture_2.png").shape, "a name that was given is not chosen"


def test_the_shape_of_the_picture_is_kept(model: Path, work: Path) -> None:
    picture(size=128).crop((0, 0, 128, 64)).save("wide.png")
    assert run(model, "--control", "canny=wide.png", "--out", "a.png") == 0
    width, height = Image.open("a.png").size
    assert width / height == pytest.approx(2, rel=0.15)
    assert run(model, "--control", "canny=wide.png", "--size", "64x96", "--out", "b.png") == 0
    assert Image.open("b.png").size == (64, 96)


def test_sizes_are_rounded_with_a_line(model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--size", "63x70", "--out", "a.png") == 0
    assert "--size is 63 x 70, sides must be multiples of 4: the result is 64 x 72" in capsys.readouterr().err
    assert Image.open("a.png").size == (64, 72)
    assert run(model, "--size", "60x64", "--control", "canny=lines.png", "--out", "b.png") == 0
    assert "must be multiples of 8: the result is 64 x 64" in capsys.readouterr().err


def test_an_inverted_map_is_told(model: Path, work: Path, capsys: Any) -> None:
    Image.fromarray(255 - np.asarray(lines())).save("dark.png")
    assert run(model, "--control", "canny=dark.png,detect=none", "--out", "a.png") == 0
    assert "expects edges, white on black; its control image seems to be black on white" in capsys.readouterr().err
    assert run(model, "--control", "canny=lines.png,detect=none", "--out", "a.png") == 0
    assert "expects" not in capsys.readouterr().err


# Pictures that are unusual and right: how the file is made, and what it must be the same as.


def exif_turned(path: Path) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = picture(size=64).crop((0, 0, 64, 48))
    upright.transpose(Image.Transpose.ROTATE_90).save(path, format="PNG", exif=exif)
    return upright


def sixteen_bits(path: Path) -> Image.Image:
    grey = picture().convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path, format="PNG")
    return grey.convert("RGB")


def cmyk(path: Path) -> Image.Image:
    picture().convert("CMYK").save(path, format="JPEG", quality=100)
    return picture()


def palette_with_alpha(path: Path) -> Image.Image:
    source = picture().quantize(16)
    source.save(path, format="PNG", transparency=bytes([0, *[255] * 15]))
    shown = source.convert("RGB")
    shown.paste("white", mask=Image.fromarray((np.asarray(source) == 0).astype(np.uint8) * 255))
    return shown


def animated_webp(path: Path) -> Image.Image:
    picture().save(path, format="WEBP", save_all=True, append_images=[picture(9)], lossless=True)
    return picture()


def one_pixel(path: Path) -> Image.Image:
    Image.new("RGB", (1, 1), (200, 30, 40)).save(path, format="PNG")
    return Image.new("RGB", (64, 64), (200, 30, 40))


UNUSUAL: dict[str, Callable[[Path], Image.Image]] = {
    f.__name__: f for f in (exif_turned, sixteen_bits, cmyk, palette_with_alpha, animated_webp, one_pixel)
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_read_right(name: str, model: Path, work: Path) -> None:
    UNUSUAL[name](Path("a.png")).save("plain.png")
    wanted = Image.open("plain.png").size
    size = ["--size", f"{wanted[0]}x{wanted[1]}", "--strength", "0.5"]
    for file in ("a", "plain"):
        assert run(model, *size, "--image", f"{file}.png", "--out", f"{file}-out.png") == 0
    assert np.abs(pixels("a-out.png") - pixels("plain-out.png")).max() <= (12 if name == "cmyk" else 2)


def test_a_picture_of_1_by_4000_and_a_mask_of_another_size(model: Path, work: Path) -> None:
    Image.new("RGB", (1, 4000), "red").save("thin.png")
    Image.new("L", (300, 10), 255).save("wide-mask.png")
    assert run(model, "--control", "canny=thin.png", "--out", "a.png") == 0
    width, height = Image.open("a.png").size
    assert height <= 5 * width
    assert run(model, "--image", "photo.png", "--mask", "wide-mask.png", "--out", "b.png") == 0
    assert run(model, "--image", "photo.png", "--mask", "mask.png", "--out", "c.png") == 0
    assert np.array_equal(pixels("b.png"), pixels("c.png")), "both masks are white"


# What is wrong: files that the case needs, arguments, and the line that says so.


def truncated(path: Path) -> None:
    picture(size=256).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def huge(path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    assert path.stat().st_size < 5000


def copy_of(model: Path, change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        change(Path(shutil.copytree(model, path)))

    return make


def cut_weights(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def foreign_module(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["os", "system"]}))


def leads_outside(folder: Path) -> None:
    shutil.move(folder / "vae", folder.parent / "elsewhere")
    (folder / "vae").symlink_to(folder.parent / "elsewhere")


def cut_file(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.diffusion_model.a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])


FILES: dict[str, Callable[[Path], Any]] = {
    "empty.png": lambda path: path.write_bytes(b""),
    "cut.jpg": truncated,
    "huge.png": huge,
    "moving.gif": lambda path: picture().save(path, save_all=True, append_images=[picture(1)]),
    "folder.png": lambda path: path.mkdir(),
    "weights.ckpt": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "cut.safetensors": cut_file,
}
BAD: dict[str, tuple[list[str], str]] = {
    "text_as_picture": (["--image", "text.png"], "text.png is not a PNG, JPEG or WEBP image"),
    "empty_file": (["--image", "empty.png"], "empty.png is not a PNG, JPEG or WEBP image"),
    "truncated": (["--control", "canny=cut.jpg"], "cut.jpg cannot be read as an image"),
    "huge": (["--control", "canny=huge.png"], "huge.png has "),
    "animated_gif": (["--image", "moving.gif"], "moving.gif is not a PNG, JPEG or WEBP image"),
    "folder_as_picture": (["--image", "folder.png"], "folder.png has no pictures"),
    "broken_mask": (["--image", "photo.png", "--mask", "text.png"], "text.png is not a PNG"),
    "broken_control_mask": (["--control", "canny=photo.png,mask=text.png"], "text.png is not a PNG"),
    "mask_alone": (["--mask", "mask.png"], "--mask needs --image"),
    "strength_alone": (["--strength", "0.5"], "--strength needs --image"),
    "strength": (["--image", "photo.png", "--strength", "-1"], "--strength is -1.0; it must be between 0 and 1"),
    "control_form": (["--control", "canny"], "must be KIND=IMAGE"),
    "control_option": (["--control", "canny=photo.png,scal=1"], "no option 'scal'"),
    "control_number": (["--control", "canny=photo.png,scale=big"], "scale='big' must be a number"),
    "control_nan": (["--control", "canny=photo.png,scale=nan"], "Control scale is nan; it must be a finite number"),
    "control_levels": (["--control", "canny=photo.png,scale=1:2"], "Control scale lists 2 levels; the base has 4"),
    "control_window": (["--control", "canny=photo.png,start=0.8,end=0.2"], "0 <= start <= end <= 1"),
    "control_guidance": (["--control", "canny=photo.png,guidance=inf"], "Control guidance is inf; it must be a finite"),
    "control_mode": (["--control", "canny=photo.png,mode=loud"], "Control mode is 'loud'"),
    "control_name": (["--control", "depth=photo.png"], "no control 'depth' comes with the base (it has canny)"),
    "control_file": (["--control", "canny=none.png"], "no file none.png"),
    "control_detector": (["--control", "canny=photo.png,detect=magic"], "no detector 'magic'"),
    "control_weights": (["--control", "canny=photo.png,detect=hed"], "ControlNetHED"),
    "control_folder": (["--control", "./none=photo.png"], "no model './none'"),
    "steps": (["--steps", "0"], "--steps is 0; it must be 1 to 10000"),
    "guidance": (["--guidance-scale", "nan"], "--guidance-scale is nan; it must be a finite number"),
    "many_steps": (["--steps", "100000"], "--steps is 100000"),
    "device_without_numbers": (["--device", "meta"], "no device 'meta'"),
    "grid_over_picture": (["--out", "a.png", "--grid", "a.png"], "a.png is a file that this command reads, or writes"),
    "out_is_the_input": (
        ["--control", "canny=photo.png", "--out", "photo.png"],
        "photo.png is a file that this command",
    ),
    "flow_scheduler": (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "is made for models of another kind"),
    "fit": (["--fit", "squeeze"], "--fit is 'squeeze'; it must be one of cover, contain, stretch"),
    "size": (["--size", "big"], "--size is 'big'"),
    "large_size": (["--size", "100000x100000"], "at most 64 megapixels are made"),
    "no_size": (["--size", "0x64"], "--size is 0 x 64 pixels"),
    "count": (["--count", "0"], "--count is 0"),
    "level": (["--optimize", "exakt"], "--optimize is 'exakt'; it must be one of exact, half, fast"),
    "engine": (["--engine", "packd"], "no engine 'packd'; there are eager, packed"),
    "two_number_types": (["--optimize", "half", "--dtype", "float32"], "leave out --dtype, or give --optimize exact"),
    "seed": (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
    "recipe_too_long": (
        [
            "--image",
            "photo.png",
            "--strength",
            "1",
            "--embed-controls",
            "--out",
            "a.jpg",
            "--negative-prompt",
            "x" * 70_000,
        ],
        "fit in a JPEG",
    ),
    "scheduler": (["--scheduler", "EulerDiscretScheduler"], "did you mean EulerDiscreteScheduler"),
    "device": (["--device", "abacus"], "no device 'abacus'"),
    "out_folder": (["--out", "none/a.png"], "no folder none"),
    "out_format": (["--out", "a.tiff"], "must end in .png"),
    "out_unwritable": (["--out", "/proc/a.png"], "/proc cannot be written to"),
    "unknown_argument": (["--stepz", "3"], "no argument --stepz; did you mean --steps?"),
    "no_number": (["--steps", "many"], "invalid int value: 'many'"),
    "no_recipe": (["--again", "photo.png"], "photo.png carries no recipe"),
    "no_picture_of_a_recipe": (["--again", "none.png"], "no image file none.png"),
    "two_prompts": (["--prompts", "text.png"], "give a PROMPT or --prompts, one of the two"),
    "missing_model": (["--model", "./nowhere"], "no model './nowhere'"),
    "pickle": (["--model", "weights.ckpt"], "is a pickle, which can run any code when opened; convert it once"),
    "cut_safetensors": (["--model", "cut.safetensors"], "cut.safetensors is cut short, or no safetensors file"),
}


def outcome(arguments: list[Any]) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit_:  # argparse
        return int(exit_.code or 0)


def assert_one_line(capsys: Any, message: str) -> None:
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name: str, model: Path, work: Path, capsys: Any) -> None:
    arguments, message = BAD[name]
    for file, make in FILES.items():
        if any(file in argument for argument in arguments):
            make(work / file)
    before = sorted(work.iterdir())
    common = ["--model", model, "--steps", 2, "--seed", 1]
    assert outcome(["generate", "a red fox", *common, *arguments]) == 2
    assert_one_line(capsys, message)
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_weights, "is cut short, or no safetensors file"),
        (foreign_module, "takes 'unet' from the module 'os'"),
        (leads_outside, "leads outside the model folder"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_a_damaged_model_is_one_line(change: Any, message: str, model: Path, work: Path, capsys: Any) -> None:
    change(Path(shutil.copytree(model, work / "copy")))
    assert run(work / "copy", "--out", "a.png") == 2
    assert_one_line(capsys, message)
    assert not Path("a.png").exists()


def test_a_cut_control_is_one_line(model: Path, work: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(model / "more" / "net", work / "net"))
    file = next(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert run(model, "--control", f"{copy}=photo.png", "--out", "a.png") == 2
    assert_one_line(capsys, "is cut short, or no safetensors file")


@pytest.mark.parametrize("suffix", ["png", *(pytest.param(own, marks=pytest.mark.heavy) for own in ("jpg", "webp"))])
def test_a_full_disk_is_exit_code_1_and_leaves_no_file(suffix: str, model: Path, work: Path, capsys: Any) -> None:
    """The disk's end is the largest size that a process may write; 1 kB here."""
    before, (soft, hard) = sorted(work.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert run(model, "--out", f"a.{suffix}") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("diffusion-kit: ") == error.count("File too large") == 1
    assert "Traceback" not in error
    assert sorted(work.iterdir()) == before


def test_debug_shows_the_traceback(model: Path, work: Path, capsys: Any) -> None:
    assert run(model, "--steps", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give a PROMPT"),
        (["paint"], "invalid choice: 'paint'"),
        (["detect"], "give the NAME of a detector"),
        (["show"], "PICTURE"),
        (["show", "photo.png"], "photo.png carries no recipe"),
        (["models", "./nowhere"], "no model './nowhere'"),
        (["models", "photo.png"], "photo.png is no model"),
        (["models", "--convert", "none.pth"], "no file none.pth"),
        (["models", "--convert", "text.png"], "text.png holds more than tensors, which is refused, or is no pickle"),
        (["detect", "magic", "photo.png"], "no detector 'magic'"),
        (["detect", "canny", "none.png"], "no image file none.png"),
        (["detect", "canny", "text.png"], "text.png is not a PNG"),
        (["detect", "canny", "photo.png", "--option", "low"], "must be NAME=VALUE"),
        (["detect", "canny", "photo.png", "--option", "lwo=3"], "did you mean 'low'?"),
        (["detect", "canny", "photo.png", "--option", "low=much"], "low='much' must be a number"),
        (
            ["detect", "canny", "photo.png", "--option", "invert=true"],
            "--option invert: only options of the detector's own",
        ),
        (["detect", "canny", "photo.png", "--resolution", "0"], "image_resolution is 0"),
        (["detect", "canny", "photo.png", "-o", "none/a.png"], "no folder none"),
        (["detect", "canny", "photo.png", "--resolution", "40000"], "at most 64 megapixels are made"),
        (["detect", "canny", "photo.png", "-o", "photo.png"], "photo.png is a file that this command reads"),
        (["detect", "canny", "photo.png", "lines.png", "-o", "a.png"], "a.png is the name of a picture"),
    ],
)
def test_other_commands_say_what_is_wrong(arguments: list[str], message: str, work: Path, capsys: Any) -> None:
    before = sorted(work.iterdir())
    assert outcome(arguments) == 2
    assert_one_line(capsys, message)
    assert sorted(work.iterdir()) == before


def test_detect(work: Path, capsys: Any) -> None:
    assert main(["detect", "canny", "photo.png", "-o", "a.png", "--option", "low=20", "--option", "high=60"]) == 0
    assert main(["detect", "canny", "photo.png"]) == 0
    assert (pixels("a.png") > 0).sum() > (pixels("photo-canny.png") > 0).sum()
    assert main(["detect", "canny", "photo.png", "-o", "b.png", "--resolution", "48", "--invert"]) == 0
    assert pixels("b.png").shape == (48, 48, 3)
    assert pixels("b.png").mean() > 127
    (work / "photos").mkdir()
    picture(1).save("photos/one.jpg")
    Path("photos/two.png").write_text("no picture")
    picture(3).save("photos/three.webp")
    capsys.readouterr()
    assert main(["detect", "greyscale", "photos", "-o", "maps"]) == 2
    assert sorted(p.name for p in Path("maps").iterdir()) == ["one.png", "three.png"]
    said = capsys.readouterr()
    assert "photos/two.png is not a PNG" in said.err
    assert "1 of 3 images failed" in said.err
    assert "2 control images in maps" in said.out


def test_detect_list_and_doctor(capsys: Any) -> None:
    assert main(["detect", "--list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "ready" in rows["canny"]
    assert "ControlNetHED" in rows["hed"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "diffusers", "device cpu", "would be used", "canny", "pip install", "model default"):
        assert part in text


def test_doctor_fails_where_a_package_is_too_old(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import importlib.metadata

    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0" if name == "diffusers" else true(name))
    assert main(["doctor"]) == 2
    assert "diffusers 0.1.0, but diffusers~=0.42.0 is needed: pip install" in capsys.readouterr().err


def test_models(model: Path, work: Path, capsys: Any) -> None:
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    for name, kind in (("canny", "T2IAdapter"), ("canny_controlnet", "ControlNetModel"), ("regions", "Control-LoRA")):
        assert re.search(rf"^  control {name} +{kind},", told, re.MULTILINE)
    assert main(["models", str(model)]) == 0
    text = capsys.readouterr().out
    for part in ("SDXLPipeline", "UNet2DConditionModel", "T2IAdapter", "white on black", "M parameters", "sha256:"):
        assert part in text
    assert main(["models", str(model / "more" / "net")]) == 0
    assert "ControlNetModel" in capsys.readouterr().out
    assert main(["models", str(model / "unet" / "diffusion_pytorch_model.safetensors")]) == 0
    assert "a UNet" in capsys.readouterr().out


def test_convert_writes_the_tensors_beside(work: Path, capsys: Any) -> None:
    from safetensors.torch import load_file

    torch.save({"state_dict": {"a": torch.arange(3.0), "b": torch.ones(2, 2).T}}, "net.pth")
    assert main(["models", "--convert", "net.pth"]) == 0
    assert capsys.readouterr().out.strip() == "net.safetensors"
    tensors = load_file("net.safetensors")
    assert torch.equal(tensors["a"], torch.arange(3.0))
    assert main(["models", "--convert", "net.pth"]) == 2
    assert_one_line(capsys, "net.safetensors is there already")
    torch.save({"a": Path("x")}, "code.pth")
    assert main(["models", "--convert", "code.pth"]) == 2
    assert_one_line(capsys, "code.pth holds more than tensors")


def test_parse_control_takes_commas_in_file_names() -> None:
    spec = parse_control("canny=a,b.png,scale=0.5,detect=none")
    assert spec == {"kind": "canny", "image": "a,b.png", "scale": 0.5, "detect": "none"}


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from diffusion_kit.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")


def test_a_kit_that_is_not_installed_makes_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the path has no package's version."""
    from diffusion_kit.making import pictures

    monkeypatch.setattr(pictures, "PACKAGES", ("torch", "no-such-package"))
    assert list(pictures.versions()) == ["torch"]
