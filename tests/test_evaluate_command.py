"""`diffusion-kit evaluate` with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusion_kit import detect
from diffusion_kit.cli import main
from diffusion_kit.commands.evaluate import write

QUICK = ["--seeds", "1", "--steps", "2"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, draw in (("disc", ImageDraw.ImageDraw.ellipse), ("square", ImageDraw.ImageDraw.rectangle)):
        photo = Image.new("RGB", (64, 64), "white")
        draw(ImageDraw.Draw(photo), (12, 12, 52, 52), fill="red")
        photo.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a red {name}\n")
    return folder


def evaluate(*arguments: Any) -> int:
    return main(["evaluate", "--control", "canny", *map(str, arguments)])


def test_a_folder_of_photos_and_a_list_of_their_maps(photos: Path, tmp_path: Path, capsys: Any) -> None:
    whole = ["--conditions", photos, "--photos", "--scales", "0.5,1", "--neutral", *QUICK]
    assert evaluate(*whole, "--out", tmp_path / "one") == 0
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [line["arm"] for line in report["lines"]] == ["without", "scale 0.5", "scale 1", "neutral"]
    assert report["about"]["guidance"] == 2.5, "the embedded model's"
    assert report["about"]["steps"] == 2
    assert "edge F1, more is better" in table
    assert len(list((tmp_path / "one").glob("*.png"))) == 2 * 9
    assert "a red disc" in (tmp_path / "one" / "index.html").read_text()

    rows = []
    for name in ("disc", "square"):
        detect("canny", photos / f"{name}.png").save(tmp_path / f"{name}-map.png")
        row = {"image": f"{name}-map.png", "caption": f"a red {name}", "photo": f"photos/{name}.png"}
        rows.append(json.dumps(row))
    (tmp_path / "maps.jsonl").write_text("\n".join(rows))
    listed = ["--conditions", tmp_path / "maps.jsonl", "--scales", "0.5,1", "--neutral", *QUICK]
    assert evaluate(*listed, "--json", "--batch", 1, "--out", tmp_path / "two") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["lines"] == report["lines"]
    assert not list(tmp_path.glob(".*")), "what is not whole is not left"


def test_the_detector_may_look_at_another_resolution(photos: Path, tmp_path: Path, capsys: Any) -> None:
    for name, more in (("plain", []), ("large", ["--detect-resolution", 128])):
        given = ["--conditions", photos, "--photos", "--json", *QUICK, *more, "--out", tmp_path / name]
        assert evaluate(*given) == 0
    told = [json.loads(text)["about"] for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    assert [own["settings"] for own in told] == [{}, {"detect_resolution": 128}]
    maps = [np.asarray(Image.open(tmp_path / name / "000-00.png")) for name in ("plain", "large")]
    assert (maps[0] != maps[1]).any()


def test_an_engine_gives_the_same_figures_and_is_named(photos: Path, tmp_path: Path, capsys: Any) -> None:
    lines = []
    for name, more in (("plain", []), ("packed", ["--optimize", "exact", "--engine", "packed"])):
        given = ["--conditions", photos, "--photos", *QUICK, *more, "--out", tmp_path / name]
        assert evaluate(*given) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        lines.append([(line["own"]["value"], line["shuffled"]["value"]) for line in report["lines"]])
    assert np.allclose(*lines, atol=0.02), "pixels at an edge's threshold may differ by rounding"
    assert (report["about"]["optimize"], report["about"]["engine"]) == ("exact", "packed")


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def to_json(self) -> str:
            return "{}"

        def page(self, folder: Path) -> None:
            (folder / "000-00.png").write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write(Broken(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "a,1"], "--scales is 'a,1'; it must be numbers with commas between"),
        (["--scales", "nan"], "--scales is 'nan'"),
        (["--detector", "blur"], "no measure for detector 'blur'; there are some for canny"),
        (["--option", "lo=3"], "detector 'canny' takes no option 'lo'; did you mean 'low'"),
        (["--lpips", "alex.pth"], "alex.pth is a pickle"),
        (["--out", "."], "--out . is there already: give another name"),
        (["--out", "no/where"], "there is no folder no"),
        (["--conditions", "nothing"], "--conditions nothing: no such folder or file"),
        (["--optimize", "exakt"], "--optimize is 'exakt'; it must be one of exact, half, fast"),
        (["--optimize", "half", "--dtype", "float32"], "computes in half precision: leave out --dtype"),
        (["--engine", "packd"], "no engine 'packd'; there are eager, packed"),
        (["--seeds", "0"], "seeds is 0; it must be 1 or more"),
        (["--seed", "99999999999999999999"], "it must be 0 or more, and below 2^63"),
    ],
)
def test_errors_are_one_line(photos: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    given = ["--conditions", photos, "--photos", "--out", tmp_path / "out", *QUICK, *arguments]
    assert evaluate(*given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("photos/square.txt", None, "there is no square.txt, the caption of an image"),
        ("list.jsonl", '{"image": "a.png"}', "list.jsonl line 1 has no caption"),
        ("list.jsonl", '{"image": "a.png", "caption": "x"}\nnone', "list.jsonl line 2 is no JSON object"),
        ("list.jsonl", '{"image": 3, "caption": "x"}', "list.jsonl line 1 is no JSON object with the texts"),
        ("list.jsonl", '{"image": "a.png", "caption": "x"}', "no image file"),
        ("list.jsonl", "", "number of conditions is 0"),
    ],
)
def test_conditions_that_are_none(
    photos: Path, tmp_path: Path, capsys: Any, name: str, text: str | None, message: str
) -> None:
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    place = photos if text is None else tmp_path / name
    assert evaluate("--conditions", place, "--out", tmp_path / "out", *QUICK) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
