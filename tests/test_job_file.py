"""Many pictures from a job file, and pictures of an optimized pipeline, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_one_line, outcome, pixels

from diffusion_kit.cli import main
from diffusion_kit.making import pictures
from diffusion_kit.pipelines import engines
from diffusion_kit.pipelines.optimize import half_of
from diffusion_kit.recipes import Recipe, read, save
from diffusion_kit.sampling.engines import Engine

pytestmark = pytest.mark.usefixtures("work")


def written(*lines: Any, file: str = "jobs.jsonl") -> str:
    Path(file).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def run(model: Path, *arguments: Any) -> int:
    return outcome(["generate", "--model", model, "--steps", 2, *arguments])


JOBS = (
    {"prompt": "a red fox", "seed": 3},
    {"prompt": "a red fox", "control": "canny=photo.png,scale=0.5", "out": "lines.webp", "count": 2},
    "",
    {"seed": 4, "size": "96x64", "guidance_scale": 2, "image": "photo.png", "strength": 0.8, "mask": "mask.png"},
)
FILES = ["1.png", "4.png", "lines-1.webp", "lines-2.webp"]


def names(folder: str = "made") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_every_line_is_its_own_command(model: Path, capsys: Any) -> None:
    assert run(model, "a blue boat", "--jobs", written(*JOBS), "--out", "made") == 0
    assert names() == FILES
    assert run(model, "a red fox", "--seed", 3, "--out", "alone.png") == 0
    assert np.array_equal(pixels("alone.png"), pixels("made/1.png"))
    own = ["--control", "canny=photo.png,scale=0.5", "--seed", 1, "--out", "alone.webp"]
    assert run(model, "a red fox", *own) == 0
    assert np.array_equal(pixels("alone.webp"), pixels("made/lines-2.webp"))
    last = read("made/4.png")
    assert isinstance(last, Recipe)
    assert (last.prompt, last.width, last.strength, last.guidance_scale) == ("a blue boat", 96, 0.8, 2.0)


def test_lines_that_are_added_change_no_names(model: Path, capsys: Any) -> None:
    line = {"prompt": "a fox"}
    assert run(model, "--jobs", written(*[line] * 9), "--out", "made") == 0
    assert run(model, "--jobs", written(*[line] * 10), "--out", "made") == 0
    assert "9 of 10 pictures are there" in capsys.readouterr().err
    assert names() == sorted(f"{k}.png" for k in range(1, 11))


def test_it_goes_on_where_it_was_stopped(
    model: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["a blue boat", "--jobs", written(*JOBS), "--out", "made"]
    real, count = pictures.make_picture, [0]

    def make(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pictures, "make_picture", make)
    assert run(model, *command) != 0
    assert names() == ["1.png", "lines-1.webp"]
    times = {file: Path("made", file).stat().st_mtime_ns for file in names()}
    assert run(model, *command) == 0
    assert count[0] == 5
    assert "2 of 4 pictures are there" in capsys.readouterr().err
    assert names() == FILES
    assert all(Path("made", file).stat().st_mtime_ns == time for file, time in times.items())
    assert run(model, *command) == 0
    assert count[0] == 5


def test_what_is_there_and_is_another_picture_is_kept(model: Path, capsys: Any) -> None:
    jobs = written({"prompt": "a red fox"})
    assert run(model, "--jobs", jobs, "--out", "made") == 0
    before = Path("made/1.png").read_bytes()
    capsys.readouterr()
    assert run(model, "--jobs", written({"prompt": "a cat"}), "--out", "made") == 2
    assert_one_line(capsys, "jobs.jsonl, line 1: made/1.png is there and is not the picture of its job")
    assert Path("made/1.png").read_bytes() == before


BAD: dict[str, tuple[Any, str]] = {
    "no_json": ("{prompt}", "line 1: no JSON: "),
    "no_object": ("[1]", "line 1: it must be an object"),
    "key": ({"prompt": "a", "sed": 1}, "line 1: no key 'sed'; did you mean seed?"),
    "other_key": ({"model": "default"}, "line 1: no key 'model'; there are prompt, "),
    "type": ({"prompt": "a", "seed": "1"}, 'line 1: seed is "1"; it must be a whole number'),
    "truth": ({"prompt": "a", "steps": True}, "line 1: steps is true; it must be a whole number"),
    "controls": ({"prompt": "a", "control": [1]}, "line 1: control is [1]; it must be a list of texts"),
    "folder": ({"prompt": "a", "out": "../a.png"}, "line 1: out is '../a.png'; it must be a file name"),
    "suffix": ({"prompt": "a", "out": "a.gif"}, "line 1: out is 'a.gif'; it must be a file name that ends in"),
    "no_prompt": ({"seed": 1}, "line 1: give a PROMPT"),
    "no_file": ({"prompt": "a", "image": "none.png"}, "line 1: no file none.png"),
    "no_picture": ({"prompt": "a", "image": "text.png"}, "line 1: text.png is not a PNG"),
    "steps": ({"prompt": "a", "steps": 0}, "line 1: --steps is 0"),
    "count": ({"prompt": "a", "count": 0}, "line 1: --count is 0"),
    "control": ({"prompt": "a", "control": "cany=photo.png"}, "line 1: "),
    "empty": ("", "jobs.jsonl has no jobs"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_one_line_before_any_picture(name: str, model: Path, capsys: Any) -> None:
    line, message = BAD[name]
    assert run(model, "--jobs", written(line), "--out", "made") == 2
    assert_one_line(capsys, message)
    assert not Path("made").exists() or not names()


def test_options_that_do_not_fit_are_one_line(model: Path, capsys: Any) -> None:
    jobs = written({"prompt": "a", "out": "a.png"}, {"prompt": "b", "out": "a.png"})
    for more, message in [
        ([], "line 2: a.png is the picture of another line"),
        (["--grid", "grid.png"], "--jobs and --grid do not go together"),
        (["--jobs", "none.jsonl"], "no job file none.jsonl"),
        (["--out", "photo.png"], "--out photo.png is a file"),
    ]:
        assert run(model, "--jobs", jobs, *more) == 2
        assert_one_line(capsys, message)


def test_an_optimized_picture_says_how_and_is_made_again(
    model: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["a red fox", "--seed", 1]
    assert run(model, *common, "--out", "plain.png") == 0
    assert run(model, *common, "--engine", "packed", "--out", "packed.png") == 0
    assert np.abs(pixels("packed.png") - pixels("plain.png")).max() <= 1
    assert run(model, *common, "--optimize", "half", "--engine", "eager", "--out", "half.png") == 0
    recipes = {name: read(f"{name}.png") for name in ("plain", "packed", "half")}
    told = {name: (r.optimize, r.engine, r.dtype) for name, r in recipes.items() if isinstance(r, Recipe)}
    assert told == {
        "plain": (None, None, "float32"),
        "packed": ("exact", "packed", "float32"),
        "half": ("half", "eager", str(half_of(torch.device("cpu"))).removeprefix("torch.")),
    }
    for name in ("packed", "half"):
        assert main(["generate", "--again", f"{name}.png", "--out", "again.png"]) == 0
        assert np.array_equal(pixels("again.png"), pixels(f"{name}.png"))
        capsys.readouterr()
        assert main(["show", f"{name}.png"]) == 0
        assert f"{told[name][0]}, engine {told[name][1]}" in capsys.readouterr().out
    assert main(["generate", "--again", "half.png", "--optimize", "exact", "--out", "full.png"]) == 0
    assert np.abs(pixels("full.png") - pixels("plain.png")).max() <= 1


def test_an_engine_that_is_not_here_is_told_and_replaced(
    model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(model, "a red fox", "--seed", 1, "--engine", "eager", "--out", "a.png") == 0
    recipe = read("a.png")
    assert isinstance(recipe, Recipe)
    save(Image.open("a.png"), "b.png", replace(recipe, engine="cudagraph"))
    capsys.readouterr()
    monkeypatch.setattr(engines, "QUICK", ("eager", "packed"))  # the others take their time to be measured
    for call in (["generate", "--again", "b.png"], ["generate", "--again", "a.png", "--engine", "cudagraph"]):
        assert main([*call, "--out", "c.png"]) == 0
        told = "cudagraph is for CUDA, the pipeline is on cpu: the fastest engine here takes its place"
        assert capsys.readouterr().err.count(told) == 1
        assert np.abs(pixels("c.png") - pixels("a.png")).max() <= 1
        made = read("c.png")
        assert isinstance(made, Recipe)
        assert made.engine != "cudagraph"


def test_what_fails_while_it_is_made_has_its_line(model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pictures.make_picture

    def make(pipe: Any, recipe: Any) -> Any:
        if recipe.prompt == "a bad one":
            raise ValueError("cannot be made")
        return real(pipe, recipe)

    monkeypatch.setattr(pictures, "make_picture", make)
    jobs = written({"prompt": "a red fox"}, {"prompt": "a bad one"})
    assert run(model, "--jobs", jobs, "--out", "made") == 2
    assert "diffusion-kit: jobs.jsonl, line 2: cannot be made\n" in capsys.readouterr().err
    assert names() == ["1.png"]


def test_what_an_engine_could_not_do_is_told(model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Engine):
        name = "packed"

        def network(self, network: Any) -> Any:
            self.note("a network runs as it is")
            return network

    monkeypatch.setitem(engines.ENGINES, "packed", Refusing)
    monkeypatch.setattr(engines.onednn, "obstacle", lambda dtype: None)
    assert run(model, "a red fox", "--engine", "packed", "--seed", 1, "--out", "fox.png") == 0
    assert capsys.readouterr().err.count("a network runs as it is") == 1
