"""Training data in every layout: the same records, through tars and back, with bad files among them."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
import yaml
from conftest import lines, picture
from PIL import Image

from diffusion_kit.cli import main
from diffusion_kit.training.config import DataConfig, SourceConfig
from diffusion_kit.training.data.check import check, contact_sheet
from diffusion_kit.training.data.sources import Record, open_source
from diffusion_kit.training.data.webdataset import free_key, import_tars, write_tars

NAMES = ["a.png", "b.jpg", "c.webp", "deep/d.png", "e.png"]
CAPTIONS = [("a fox",), ("one", "two"), ("ein Füchslein, 狐",), ("d",), ("e",)]

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for k, (name, captions) in enumerate(zip(NAMES, CAPTIONS, strict=True)):
        for place, made in ((root / name, picture(k)), (root / "conditioning_image" / name, lines(k))):
            place.parent.mkdir(parents=True, exist_ok=True)
            made.save(place)
        (root / name).with_suffix(".txt").write_text("\n".join(captions))
    return root


def sources(path: str | Path, **more: Any) -> Any:
    return open_source(SourceConfig(path=str(path), **more))


def records(path: str | Path, **more: Any) -> list[Record]:
    source = sources(path, **more)
    return [source[k] for k in range(len(source))]


def content(record: Record) -> tuple[Any, ...]:
    """What a training sees of a record, whatever it was kept in."""
    files = [
        part.read_bytes() if isinstance(part, Path) and part.is_file() else part
        for part in (record.image, record.condition)
    ]
    return *files, record.captions


def contents(path: str | Path, **more: Any) -> list[Any]:
    return [content(record) for record in records(path, **more)]


def config(path: Any, **more: Any) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(path)),), resolution=64, **more)


def kinds(data: DataConfig, **more: Any) -> set[tuple[str, str]]:
    return {(found.kind, Path(found.picture).name) for found in check(data, **more).found}


# Layouts


def as_list(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    rows = [
        {"image": name, "conditioning_image": f"conditioning_image/{name}", "text": list(captions)}
        for name, captions in zip(NAMES, CAPTIONS, strict=True)
    ]
    (out / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return out


def table(folder: Path, feature: Any) -> datasets.Dataset:
    wrap = (lambda data: data) if isinstance(feature, datasets.Value) else (lambda data: {"bytes": data, "path": None})
    columns: dict[str, Any] = {"image": [], "conditioning_image": [], "text": [list(texts) for texts in CAPTIONS]}
    for image, condition, _ in contents(folder):
        columns["image"].append(wrap(image))
        columns["conditioning_image"].append(wrap(condition))
    texts = datasets.List(datasets.Value("string"))
    features = datasets.Features({"image": feature, "conditioning_image": feature, "text": texts})
    return datasets.Dataset.from_dict(columns, features=features)


def as_disk(folder: Path, out: Path) -> Path:
    table(folder, datasets.Image()).save_to_disk(out)
    return out


def as_arrow(folder: Path, out: Path) -> Path:
    return next(as_disk(folder, out).glob("*.arrow"))


def as_parquet(folder: Path, out: Path) -> Path:
    table(folder, datasets.Value("binary")).to_parquet(file := out.with_suffix(".parquet"))
    return file


def as_parquets(folder: Path, out: Path) -> Path:
    (out / "data").mkdir(parents=True)
    for k in range(2):
        part = table(folder, datasets.Image()).shard(2, k, contiguous=True)
        part.to_parquet(out / "data" / f"train-{k}.parquet")
    return out


def as_tars(folder: Path, out: Path) -> str:
    assert write_tars(records(folder), out, 2) == []
    return f"{out}/{{000000..000002}}.tar"


def as_foreign_tars(folder: Path, out: Path) -> str:
    """As the library webdataset writes them, captions in JSON."""
    out.mkdir()
    with webdataset.ShardWriter(f"{out}/x-%02d.tar", maxcount=3, verbose=0) as writer:
        for k, (image, condition, captions) in enumerate(contents(folder)):
            parts = {"jpg": image, "conditioning_image.png": condition, "json": {"text": list(captions), "more": k}}
            writer.write({"__key__": f"part/{k:04d}", **parts})
    return f"{out}/x-{{00,01}}.tar"


LAYOUTS: dict[str, Callable[[Path, Path], str | Path]] = {
    name.removeprefix("as_"): value for name, value in list(globals().items()) if name.startswith("as_")
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_records_in_this_process_and_in_workers(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    path, expected = LAYOUTS[layout](folder, tmp_path / "out"), contents(folder)
    assert contents(path) == expected
    assert contents(path) == expected  # read again, from what the first time left
    source = sources(path)
    packed = pickle.dumps(source)
    assert [content(pickle.loads(packed)[k]) for k in (3, 0, 3)] == [expected[k] for k in (3, 0, 3)]
    assert len(packed) < sum(len(image) for image, *_ in expected)  # no pictures travel
    order = [4, 1, 3, 0, 2, 2]
    loader = torch.utils.data.DataLoader(source, None, sampler=order, num_workers=2, collate_fn=content)
    assert list(loader) == [expected[k] for k in order]


@pytest.mark.parametrize("layout", ["disk", "parquet", "foreign_tars"])
def test_columns_by_other_names(layout: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    picture().save(data, "PNG")
    row = {
        "image": b"no",
        "photo": data.getvalue(),
        "edge": data.getvalue(),
        "words": "a fox",
        "width": 64,
        "height": 64,
    }
    names, out = {"image": "photo", "condition": "edge", "caption": "words"}, tmp_path / "out"
    if layout == "foreign_tars":
        with webdataset.TarWriter(str(out := tmp_path / "x.tar")) as writer:
            told = {"words": row["words"], "width": 64, "height": 64}
            writer.write({"__key__": "k", "png": b"no", "photo.png": row["photo"], "edge": row["edge"], "json": told})
    elif layout == "disk":
        datasets.Dataset.from_list([row]).save_to_disk(out)
    else:
        datasets.Dataset.from_list([row]).to_parquet(out := tmp_path / "x.parquet")
    (record,) = records(out, **names)
    assert content(record) == (data.getvalue(), data.getvalue(), ("a fox",))
    assert record.size == (64, 64)


def test_of_a_name_that_was_given_nothing_else_stands_in(tmp_path: Path) -> None:
    data = (picture().save(buffer := io.BytesIO(), "PNG"), buffer.getvalue())[1]
    members = {"a.PNG": data, "a.edge.png": data, "b.png": data, "b.condition.PNG": data, "b.txt": b"b"}
    tar = write_members(tmp_path / "x.tar", members)
    assert [record.condition for record in records(tar)] == [None, data]
    assert [record.condition for record in records(tar, condition="edge")] == [data, None]
    assert [record.captions for record in records(tar, caption="words")] == [("",), ("",)]


def test_folders_are_read_through_links_each_once(tmp_path: Path) -> None:
    """Under the name that they have without links, where they have one; conditions are no pictures by any name."""
    own, other = tmp_path / "own", tmp_path / "other"
    for file in ("own/zz/a.png", "own/conditioning_image/zz/a.png", "other/fox.png", "other/deep/fox.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(tmp_path / file)
    for link, place in {
        own / "all": own / "zz",
        own / "canny": own / "conditioning_image",
        own / "deep": other / "deep",
        own / "linked": other,
        other / "round": own,
        own / "conditioning_image/back": own / "zz",
    }.items():
        link.symlink_to(place)
    source = open_source(SourceConfig(path=str(own)))
    records = [source[k] for k in range(len(source))]
    assert [record.name for record in records] == ["deep/fox.png", "linked/fox.png", "zz/a.png"]
    assert records[2].condition == own / "conditioning_image/zz/a.png"


def test_paths_in_a_table_are_relative_to_it(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    datasets.Dataset.from_list([{"image": "a.png"}, {"image": None}]).to_parquet(tmp_path / "x.parquet")
    first, second = records(tmp_path / "x.parquet")
    assert first.image == tmp_path / "a.png"
    assert first.captions == ("",)
    assert kinds(config(tmp_path / "x.parquet", condition={"detector": "canny"}), captions=False) == {
        ("unreadable", "x.parquet row 1")
    }
    assert second.condition is None


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"image": "photo"}, "has no column 'photo'; it has image, conditioning_image, text: set image=NAME"),
        ({"condition": "edge"}, "has no column 'edge'; it has image, conditioning_image, text: set condition=NAME"),
    ],
)
def test_missing_columns_are_named(more: dict[str, str], line: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{as_parquet(folder, tmp_path / 'x')} {line}$"):
        sources(tmp_path / "x.parquet", **more)


def test_of_several_saved_tables_one_has_to_be_named(folder: Path, tmp_path: Path) -> None:
    datasets.DatasetDict(train=(own := table(folder, datasets.Image())), test=own).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="holds several tables, test, train: name one of them"):
        open_source(SourceConfig(path=str(tmp_path / "both")))
    assert len(open_source(SourceConfig(path=str(tmp_path / "both" / "train")))) == len(own)


@pytest.mark.parametrize("row", [{"image": None}, {"image": "a.png", "text": 3}, {"image": "a.png", "text": [None]}])
def test_a_list_with_other_things_than_texts_is_one_line(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "a.png", "text": None}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match="list.jsonl, line 2: image and condition must be the paths of files"):
        sources(tmp_path / "list.jsonl")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_damaged_table_is_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    whole = as_parquet(folder, tmp_path / "whole") if name == "x.parquet" else as_arrow(folder, tmp_path / "whole")
    data = bytearray(whole.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a table of datasets: [^\n]+$"):
        records(tmp_path / name)


@pytest.mark.parametrize(("module", "path"), [("datasets", "x.parquet"), ("braceexpand", "{0..3}.tar")])
def test_what_is_not_installed_is_said(module: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "diffusion_kit\[data\]"$'):
        sources(tmp_path / path)


# Tars


def test_webdataset_reads_our_tars(folder: Path, tmp_path: Path) -> None:
    read = list(webdataset.WebDataset(as_tars(folder, tmp_path / "out"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["a", "b", "c", "deep_d", "e"]
    for sample, (image, condition, captions) in zip(read, contents(folder), strict=True):
        suffix = "png" if image.startswith(b"\x89PNG") else "jpg" if image.startswith(b"\xff\xd8") else "webp"
        assert sample[suffix] == image
        assert condition in sample.values()
        assert sample["txt"].decode() == "\n".join(captions)


def test_the_same_data_are_the_same_tars(folder: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        write_tars(records(folder), tmp_path / out, 2)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["000000.tar", "000001.tar", "000002.tar"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_there_and_back_again(folder: Path, tmp_path: Path) -> None:
    """Folder to tars to folder: the same bytes under the same names, flat, in the same order."""
    (folder / "big.json").write_text("no part of it")
    tars = as_tars(folder, tmp_path / "tars")
    assert import_tars([tars], tmp_path / "back") == []
    assert contents(tmp_path / "back") == contents(folder)
    files = {str(file.relative_to(tmp_path / "back")) for file in (tmp_path / "back").rglob("*.*")}
    flat = {name.replace("/", "_") for name in NAMES}
    assert files == flat | {f"conditioning_image/{name}" for name in flat} | {"metadata.jsonl"}
    (tmp_path / "back" / "metadata.jsonl").unlink()  # it is a folder of pictures without, too
    assert [content(r)[:2] for r in records(tmp_path / "back")] == [content(r)[:2] for r in records(folder)]


def test_sizes_and_line_breaks_survive_tars(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    given = Record("a", tmp_path / "a.png", None, ("two\nlines", "", "three"), (64, 64))
    write_tars([given], tmp_path / "out")
    (record,) = records(tmp_path / "out" / "000000.tar")
    assert record.size == (64, 64)
    assert record.captions == ("two lines", "three")
    import_tars([str(tmp_path / "out" / "000000.tar")], tmp_path / "back")
    assert records(tmp_path / "back")[0].size == (64, 64)


def write_members(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file


HOSTILE = [
    "../../up.png",
    "/absolute.png",
    "a/../../b.png",
    "..png",
    "a b\n\x1b[2Jc.png",
    "x" * 150 + "/y.png",
    "COM/~.png",
]


def test_no_name_in_a_tar_leads_outside(tmp_path: Path, folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    tar = write_members(
        tmp_path / "x.tar", dict.fromkeys(HOSTILE, data) | {"../up.png": data, "up.condition.png": data}
    )
    with tarfile.open(tar, "a") as opened:
        link = tarfile.TarInfo("/absolute.png")  # does not stand in for the file of that name
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    before = {file for file in tmp_path.rglob("*")}
    import_tars([str(tar)] * 2, tmp_path / "deep" / "out")
    new = {file for file in tmp_path.rglob("*")} - before
    assert all(file.is_relative_to(tmp_path / "deep") for file in new)
    files = sorted(file.name for file in (tmp_path / "deep" / "out").glob("*.png"))
    assert len(files) == 2 * 7  # all but "..png", which has no key, and the one without a picture
    assert all(re.fullmatch(r"\w+\.png", name) for name in files)
    assert {"up.png", "up_2.png", "absolute.png", "a_b.png"} <= set(files)


def test_names_are_free_and_of_one_part() -> None:
    taken: dict[str, int] = {}
    names = ["a/b.png", "a_b", "A_b.jpg", "a_b_2", "a_b_2", "../a_b", "...", "", "v1.5/x.webp", "t.parquet row 17"]
    keys = [free_key(name, taken) for name in names]
    assert len({key.lower() for key in keys}) == len(names)
    assert keys[0] == "a_b"
    assert keys[-2:] == ["v1_5_x", "t_parquet_row_17"]
    assert all(key and not set(key) & set("./\\") for key in keys)


@pytest.mark.parametrize(
    "write", [lambda out: write_tars([], out), lambda out: import_tars([str(out.parent / "x.tar")], out)]
)
def test_a_folder_is_whole_or_not_there(write: Callable[[Path], Any], tmp_path: Path) -> None:
    write_members(tmp_path / "x.tar", {"a.png": b"no picture"})
    with pytest.raises(ValueError, match="^no picture can be read: "):
        write(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already: give a new folder$"):
        write(tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "inside a picture", "overwritten"])
def test_a_damaged_tar_is_used_as_far_as_it_goes(damage: str, folder: Path, tmp_path: Path) -> None:
    write_tars(records(folder), tmp_path / "out")
    tar, expected = tmp_path / "out" / "000000.tar", contents(folder)
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        member = opened.getmember("deep_d.png")
    if damage == "overwritten":
        data[member.offset : member.offset + 512] = b"x" * 512
    tar.write_bytes(data[: member.offset if damage == "cut" else member.offset_data + 99 if damage[0] == "i" else None])
    with pytest.warns(UserWarning, match=r"000000.tar is damaged \(.+\): \d pictures are used"):
        found = contents(tar)
    assert found[:3] == expected[:3]
    assert ("damaged", "") in kinds(config(tar))
    if damage == "inside a picture":
        assert ("unreadable", "deep_d") in kinds(config(tar))


def test_tars_that_are_not_there_or_have_no_pictures(tmp_path: Path) -> None:
    tar = write_members(tmp_path / "0.tar", {"a.txt": b"words"})
    with pytest.raises(FileNotFoundError, match=f"^no data {tmp_path}/1.tar$"):
        sources(tmp_path / "{0..1}.tar")
    with pytest.raises(ValueError, match=f"^{tar} has no pictures, which end in .image, .+: set image=NAME$"):
        sources(tar)


def test_a_tar_that_goes_away_is_a_missing_picture(folder: Path, tmp_path: Path) -> None:
    source = sources(as_tars(folder, tmp_path / "out"))
    (tmp_path / "out" / "000001.tar").unlink()
    assert content(source[1]) == contents(folder)[1]
    assert isinstance(source[2].image, Path)


# Check


def test_good_data_have_no_findings(folder: Path, tmp_path: Path) -> None:
    for path in (folder, as_tars(folder, tmp_path / "tars"), as_disk(folder, tmp_path / "disk")):
        findings = check(config(path))
        assert (findings.pictures, findings.found, len(findings.readable)) == (5, (), 5)


@pytest.mark.parametrize("workers", [0, 3])
def test_every_kind_of_fault_is_found(workers: int, folder: Path) -> None:
    beside = folder / "conditioning_image"
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (beside / "b.jpg").write_bytes(b"")
    (folder / "c.txt").unlink()
    shutil.copy(folder / "a.png", folder / "copy.png")
    shutil.copy(beside / "a.png", beside / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    Image.open(beside / "deep" / "d.png").resize((64, 65)).save(beside / "deep" / "d.png")
    Image.open(beside / "e.png").resize((32, 32)).save(beside / "e.png")
    picture(9, 63).save(folder / "small.png")
    (folder / "small.txt").write_text("small")
    expected = {
        ("unreadable", "broken.png"),
        ("no condition", "broken.png"),
        ("no caption", "broken.png"),
        ("unreadable", "b.jpg"),
        ("no caption", "c.webp"),
        ("duplicate", "copy.png"),
        ("other shape", "d.png"),
        ("other size", "e.png"),
        ("small", "small.png"),
        ("no condition", "small.png"),
    }
    data = config(folder, workers=workers)
    assert kinds(data) == expected
    assert check(data).problems == len(expected) - 2
    detected = config(folder, workers=workers, condition={"detector": "canny"})
    assert kinds(detected, captions=False) == {
        ("unreadable", "broken.png"),
        ("duplicate", "copy.png"),
        ("small", "small.png"),
    }


def test_what_nobody_has_is_said_once(tmp_path: Path) -> None:
    for k in range(3):
        picture(k).save(tmp_path / f"{k}.png")
    assert kinds(config(tmp_path)) == {("no condition", ""), ("no caption", "")}
    assert kinds(config(tmp_path), conditions=False, captions=False) == set()


def test_a_size_that_is_told_is_compared(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    for seed, name in enumerate(("right.png", "wrong.png")):
        picture(seed).resize((80, 64)).save(tmp_path / name, exif=turned)
    rows = [{"image": name, "width": w, "height": 144 - w} for name, w in (("right.png", 64), ("wrong.png", 80))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kinds(config(tmp_path), conditions=False, captions=False) == {("wrong size", "wrong.png")}


def test_the_detector_is_looked_at(folder: Path) -> None:
    with pytest.raises(ValueError, match="no detector 'cany'; did you mean 'canny'"):
        check(config(folder, condition={"detector": "cany"}))
    with pytest.raises(TypeError, match="takes no option 'lo'"):
        check(config(folder, condition={"detector": "canny", "options": {"lo": 1}}))
    with pytest.raises(ValueError, match="^data.sources is empty"):
        check(DataConfig())


def test_the_sheet_shows_pictures_and_their_conditions(folder: Path) -> None:
    from diffusion_kit import detect

    (folder / "broken.png").write_bytes(b"")
    given, made = config(folder), config(folder, condition={"detector": "canny"})
    sheets = [np.asarray(contact_sheet(check(data), data)).astype(int) for data in (given, made)]
    whole = lambda made: np.asarray(made.resize((160, 160), Image.Resampling.LANCZOS)).astype(int)  # noqa: E731
    for sheet, condition in zip(sheets, (lines(0), detect("canny", picture(0))), strict=True):
        assert np.abs(sheet[:160, :160] - whole(picture(0))).max() <= 1
        assert np.abs(sheet[:160, 160:320] - whole(condition)).max() <= 1
        assert (sheet[160:188, :320] < 128).any()  # the caption
        assert (sheet[196:, 328:] == 255).all()  # the broken one is left out
    few = np.asarray(contact_sheet(check(given), given, most=2)).astype(int)
    last = whole(Image.open(folder / "c.webp").convert("RGB"))
    assert len(few) == 196
    assert np.abs(few[:160, 328:488] - last).max() <= 1


# The command


@pytest.fixture
def yaml_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    data = {"sources": [{"path": str(folder)}], "resolution": 64}
    tree = {"target": "t2i_adapter", "output": "run", "steps": 1, "data": data}
    Path("config.yaml").write_text(yaml.safe_dump(tree))
    return "config.yaml"


def run(*arguments: str) -> int:
    try:
        return main(["data", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_check_by_command(yaml_file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", yaml_file, "--sheet", "sheet.png") == 0
    assert capsys.readouterr().out == "5 pictures: 0 problems, 0 notes\n"
    assert Image.open("sheet.png").size == (4 * 328, 2 * 196)
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "\x1b[2J.png").write_bytes(b"")
    assert run("check", yaml_file, "data.resolution=65") == 1
    out = capsys.readouterr().out
    assert "unreadable    a.png: a.png is not a PNG, JPEG or WEBP image\n" in out
    assert "\x1b" not in out
    (folder / "\x1b[2J.png").unlink()
    assert run("check", yaml_file, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["pictures"], told["problems"]) == (5, 1)
    assert out.endswith("6 pictures: 4 problems, 4 notes\n")
    assert [(one["kind"], one["problem"], one["picture"]) for one in told["found"]] == [("unreadable", True, "a.png")]
    assert run("check", yaml_file, "target=unet", "data.sources.0.condition=none") == 1
    assert "no condition" not in capsys.readouterr().out


def test_export_and_import_by_command(yaml_file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = contents(folder)
    (folder / "zz.png").write_bytes(b"no picture")
    assert run("export", yaml_file, "--out", "tars", "--per-shard", "3") == 0
    said = capsys.readouterr()
    assert said.out == "tars; 1 pictures are left out\n"
    assert said.err == "diffusion-kit: left out: zz.png: not a PNG, JPEG or WEBP image\n"
    assert run("import", *sorted(map(str, Path("tars").iterdir())), "--out", "back") == 0
    assert contents("back") == expected
    assert run("check", yaml_file, "data.sources=[{path: back}]") == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "config.yaml", "--sheet", "no/sheet.png"], "--sheet no/sheet.png must be a .png file in a folder"),
        (["check", "config.yaml", "data.resolutoin=5"], "no key data.resolutoin; did you mean resolution?"),
        (["check", "nothing.yaml"], "no configuration "),
        (["export", "config.yaml"], "the following arguments are required: --out"),
        (["export", "config.yaml", "--out", "x", "--per-shard", "0"], "--per-shard 0 must be 1 or more"),
        (["export", "config.yaml", "--out", "x", "--sheet", "y"], "no argument --sheet"),
        (["import", "nothing.tar", "--out", "x"], "no data "),
        (["import", "{0..1.tar", "--out", "x"], "{0..1.tar"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], line: str, yaml_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert line in said.err
