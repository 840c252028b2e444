"""What goes wrong in a training is one clear line, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_models
import yaml
from PIL import Image

from diffusion_kit import cli
from diffusion_kit.adapters import detectors
from diffusion_kit.training import checkpoints
from diffusion_kit.training.config import Config, read
from diffusion_kit.training.data.samples import Pictures
from diffusion_kit.training.group import join
from diffusion_kit.training.run import locked
from diffusion_kit.training.train import check, make_trainer, train

SMALL = {"checkpoints": {"every": 1}, "steps": 2}


def written(tmp_path: Path, config: Config) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(config.dump())
    return str(file)


def data(tmp_path: Path, **columns: list) -> dict:
    """Four pictures, in whose list some columns are replaced."""
    shutil.copytree(training_models.data(4), tmp_path / "data")
    file = tmp_path / "data" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=False):
            row[name] = value
    file.write_text("\n".join(map(json.dumps, rows)))
    return {"sources": [{"path": str(tmp_path / "data")}]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.resolutio=64", "no key data.resolutio; did you mean resolution?"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1: Input should be greater than 0"),
        ("target=lora", "target is 'lora': Input should be 't2i_adapter', 'controlnet'"),
        ("steps", "'steps' is no key=value, such as data.resolution=512"),
        ("data.sources.0.pat=x", "no key data.sources.0.pat; did you mean path?"),
        ("data.sources.1.path=x", "data.sources.1.path: '1' is no entry of a list of 1; they are counted from 0"),
        ("data.sources.path=x", "data.sources.path: 'path' is no entry of a list of 1"),
        ("base.model=/nowhere", "no model '/nowhere': no folder or file /nowhere"),
        ("data.sources=[]", "data.sources is empty: name at least one"),
        ("data.sources=[{path: /nowhere}]", "no data /nowhere"),
        ("objective.zero_terminal_snr=true", "set objective.prediction=v_prediction, or zero_terminal_snr=false"),
        ("output=/dev/null/run", "output /dev/null/run cannot be written: Not a directory"),
        (
            "objective.noise_offset=0.1 target=prior",
            "objective.noise_offset is not a prior's: an embedding has no channels of a picture",
        ),
        (
            "init_from=x target=prior",
            "init_from is for t2i_adapter, controlnet, control_lora; a prior starts from base.prior",
        ),
        ("network={a: 1} target=hint_decoder", "network.a: a hint_decoder is as its base is"),
        ("network={a: 1} target=unet", "no key network.a for the target unet; there is encoders"),
        ("validation.measure=cany", "no measure for detector 'cany'; did you mean 'canny'?"),
        ("init_from=/nowhere", "/nowhere"),
        ("target=controlnet network={rank: 3}", "no key network.rank of a ControlNet"),
        ("network={channel: [8]}", "no key network.channel of a T2IAdapter; did you mean channels?"),
        (
            "network={channels: [8]} init_from=x",
            "network.channels: a network that starts from init_from is as its weights",
        ),
        ("batch=x", "batch is 'x': it must be 1 or more, or auto"),
        ("batch=true", "batch is True: it must be 1 or more, or auto"),
        ("data.caption.separator=''", "data.caption.separator is '': String should have at least 1 character"),
        ("seed=18446744073709551616", "seed is 18446744073709551616: Input should be less than"),
        ("optimizer.betas=[1.5, 0.9]", "optimizer.betas.0 is 1.5: Input should be less than 1"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf: Input should be a finite number"),
        ("output=''", "output is '': String should have at least 1 character"),
        ("data.condition.detector=cany", "no detector 'cany'; did you mean"),
        ("batch=0", "batch is 0: it must be 1 or more, or auto"),
        ("validation.seed=-1", "validation.seed is -1: Input should be greater than or equal to 0"),
        ("data.crop=random", "data.crop is random among data.crops, and these are 1: say data.crops=8"),
        ("data.resolution=101 target=autoencoder", "a side of 101 pixels is no multiple of 4"),
    ],
)
def test_wrong_configurations(tmp_path, capfd, override, line):
    file = written(tmp_path, training_models.config("t2i_adapter", tmp_path / "run"))
    assert cli.main(["train", file, *re.split(r" (?=target|network|init_from)", override)]) == 2
    told = [own for own in capfd.readouterr().err.splitlines() if own.startswith("diffusion-kit: ")]
    assert len(told) == 1
    assert line in told[0]


def test_the_whole_configuration_is_printed_and_read_again(tmp_path, capsys):
    config = training_models.config("controlnet", tmp_path / "run", optimizer={"learning_rate": 3e-5})
    assert (
        cli.main(["train", written(tmp_path, config), "--print-config", "steps=7", "optimizer.betas=[0.5, 0.6]"]) == 0
    )
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    own = read(again)
    assert (own.steps, own.optimizer.betas, own.optimizer.learning_rate) == (7, (0.5, 0.6), 3e-5)
    assert yaml.safe_load(own.dump()) == yaml.safe_load(again.read_text())


def test_bad_pictures_are_left_out_and_named(tmp_path, capsys):
    own = data(tmp_path)
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 32)).save(tmp_path / "data" / "condition-2.png")
    train(training_models.config("t2i_adapter", tmp_path / "run", data=own, steps=4))
    told = capsys.readouterr().out
    assert "left out: 1.png" in told or "1.png is not a PNG, JPEG or WEBP image" in told
    assert "the condition of 2.png is 64 x 32, the picture 64 x 64: they must have the same shape" in told
    state = checkpoints.read(checkpoints.whole(tmp_path / "run" / "checkpoints")[-1]).state
    assert sorted(state["figures"]["bad"]) == ["1.png", "2.png"]


def test_a_record_that_cannot_be_read_is_left_out_of_the_cache_too(tmp_path, monkeypatch):
    record = Pictures.record

    def damaged(self, index):
        if index == 1:
            raise OSError("cut short")
        return record(self, index)

    monkeypatch.setattr(Pictures, "record", damaged)
    cache = {"folder": str(tmp_path / "cache")}
    train(training_models.config("t2i_adapter", tmp_path / "run", data=data(tmp_path), cache=cache, steps=2, batch=4))
    state = checkpoints.read(checkpoints.whole(tmp_path / "run" / "checkpoints")[-1]).state
    assert state["figures"]["bad"] == {"picture 1": "picture 1: OSError: cut short"}


def test_a_bad_picture_weighs_nothing(tmp_path):
    """It is not counted among those that were learned from."""
    weights = []
    for name in ("whole", "broken"):
        own = data(tmp_path / name)
        if name == "broken":
            (tmp_path / name / "data" / "0.png").write_bytes(b"")
        config = training_models.config("t2i_adapter", tmp_path / name / "run", data=own, steps=1, batch=4)
        train(config)
        folder = checkpoints.whole(tmp_path / name / "run" / "checkpoints")[-1]
        weights.append(checkpoints.read(folder).state["figures"]["used"])
    assert weights == [4.0, 3.0]


def test_no_usable_picture(tmp_path):
    own = data(tmp_path)
    for k in range(4):
        (tmp_path / "data" / f"{k}.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no picture of the data could be used in 2 steps one after the other; the last: .*\.png"
    ):
        train(training_models.config("t2i_adapter", tmp_path / "run", data=own, steps=4))


def test_a_step_that_is_not_finite_is_left_out(tmp_path, monkeypatch, capsys):
    pixels = Pictures.pixels

    def spoiled(self, record, view):
        return pixels(self, record, view) * (float("nan") if record.name == "1.png" else 1)

    monkeypatch.setattr(Pictures, "pixels", spoiled)
    train(
        training_models.config("t2i_adapter", tmp_path, data={"sources": [{"path": training_models.data(2)}]}, batch=1)
    )
    assert "the loss is not finite, the step is left out: 1.png" in capsys.readouterr().out
    last = checkpoints.read(checkpoints.whole(tmp_path / "checkpoints")[-1])
    assert all(torch.isfinite(value).all() for value in last.tensors["weights"].values())


def test_data_that_goes_away_ends_a_run_before_it_learns_from_nothing(tmp_path):
    """Steps without a picture change no weight, and after twenty the run stops where it can go on."""
    own = data(tmp_path)
    config = training_models.config("t2i_adapter", tmp_path / "run", data=own, steps=60, checkpoints={"every": 1})
    seen = []

    def pictures_go(trainer):
        seen.append([weight.detach().clone() for weight in trainer.parallel.pieces().values()])
        if trainer.step == 2:
            for file in (tmp_path / "data").glob("*.png"):
                file.unlink()
        return False

    trainer = make_trainer(config, join(config), lambda line: None)
    with pytest.raises(
        ValueError, match=r"no picture of the data could be used in 20 steps one after the other; the last"
    ):
        trainer.run(pictures_go)
    assert trainer.step == 21
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], trainer.parallel.pieces().values(), strict=True))


def test_what_lies_in_the_folder_of_a_run_is_left_alone(tmp_path):
    own = data(tmp_path)
    listed = (tmp_path / "data" / "metadata.jsonl").read_text()
    train(training_models.config("t2i_adapter", tmp_path / "data", data=own, **SMALL))
    assert (tmp_path / "data" / "metadata.jsonl").read_text() == listed
    mine = "# tried last week\n" + (tmp_path / "data" / "config.yaml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(mine)
    with pytest.raises(
        ValueError, match=r"config.yaml was written by no run, and would be replaced: give another output"
    ):
        train(training_models.config("t2i_adapter", tmp_path / "mine", **SMALL))
    assert (tmp_path / "mine" / "config.yaml").read_text() == mine


def test_a_run_does_not_write_its_pictures_among_the_data(tmp_path):
    training_models.data(4)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "0.png")
    sources = {"sources": [{"path": str(tmp_path / "pictures")}]}
    with pytest.raises(
        ValueError, match=r"output .* lies inside data.sources .*: its pictures would be taken for data"
    ):
        train(training_models.config("unet", tmp_path / "pictures" / "run", data=sources, **SMALL))


@pytest.mark.parametrize("name", ["data.zip", "list.csv", "data.tar.gz"])
def test_data_of_an_unknown_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name} is no data that is read: name a folder, or a file"):
        train(training_models.config("unet", tmp_path / "run", data={"sources": [{"path": str(tmp_path / name)}]}))


def test_other_data_goes_on_only_where_allowed(tmp_path):
    own = data(tmp_path)
    train(training_models.config("t2i_adapter", tmp_path / "run", data=own, **SMALL))
    file = tmp_path / "data" / "metadata.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:3]))
    more = training_models.config("t2i_adapter", tmp_path / "run", data=own, **{**SMALL, "steps": 3})
    with pytest.raises(
        ValueError, match=r"data.sources had 4 pictures at step 2, now there are 3.*--allow-change data"
    ):
        train(more, resume=True)
    assert train(more, resume=True, allow=["data"]) is not None


def test_checkpoints_of_which_none_is_whole(tmp_path, capsys):
    train(training_models.config("t2i_adapter", tmp_path, **SMALL))
    for folder in checkpoints.whole(tmp_path / "checkpoints"):
        (folder / "weights.safetensors").write_bytes(b"")
    logged = (tmp_path / "metrics.jsonl").read_text()
    more = training_models.config("t2i_adapter", tmp_path, **{**SMALL, "steps": 3})
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole, step-00000002 has not all its files"):
        train(more, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == logged
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="has a result and no checkpoint: give another folder, or remove it"):
        train(more, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == logged
    shutil.rmtree(tmp_path / "result")
    train(more, resume=True)
    assert "there is no checkpoint to go on from: begins at the first step" in capsys.readouterr().out


def test_a_short_disk_is_made_room_on(tmp_path, monkeypatch):
    """The oldest checkpoint goes before the new one is written, where there is no room for both."""
    train(training_models.config("t2i_adapter", tmp_path, **SMALL))
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors")) // 2

    def usage(_):
        held = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
        return SimpleNamespace(free=int(2.5 * size) - held)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", usage)
    more = {"checkpoints": {"every": 1, "keep": 2}, "steps": 3}
    train(training_models.config("t2i_adapter", tmp_path, **more), resume=True)
    assert [checkpoints.step_of(folder) for folder in checkpoints.whole(tmp_path / "checkpoints")] == [2, 3]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    train(training_models.config("t2i_adapter", tmp_path, **SMALL))
    before = checkpoints.whole(tmp_path / "checkpoints")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"has 0 MB free, a checkpoint needs .* MB: make room"):
        train(training_models.config("t2i_adapter", tmp_path, **{**SMALL, "steps": 4}), resume=True)
    assert checkpoints.whole(tmp_path / "checkpoints") == before


def test_a_write_that_fails_leaves_no_half(tmp_path, monkeypatch):
    train(training_models.config("t2i_adapter", tmp_path, **SMALL))
    before = checkpoints.whole(tmp_path / "checkpoints")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(training_models.config("t2i_adapter", tmp_path, **{**SMALL, "steps": 4}), resume=True)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_another_configuration_goes_on_only_where_allowed(tmp_path):
    train(training_models.config("t2i_adapter", tmp_path, **SMALL))
    more = {**SMALL, "steps": 3}
    with pytest.raises(ValueError, match=r"holds a run already: add --resume"):
        train(training_models.config("t2i_adapter", tmp_path, **more))
    other = training_models.config("t2i_adapter", tmp_path, **more, optimizer={"learning_rate": 1e-4})
    with pytest.raises(
        ValueError, match=r"optimizer.learning_rate is 0.0001, the run of .* has 0.001: .*--allow-change"
    ):
        train(other, resume=True)
    assert train(other, resume=True, allow=["optimizer.learning_rate"]) == tmp_path / "result"


def test_two_runs_do_not_write_one_folder(tmp_path):
    with another_run(tmp_path), pytest.raises(ValueError, match="is being written by another run"):
        train(training_models.config("t2i_adapter", tmp_path, **SMALL))


def test_a_run_that_was_killed_leaves_its_folder_free_at_once(tmp_path):
    """Its loader workers, which notice only after seconds, hold nothing of it."""
    with another_run(tmp_path) as process:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with locked(tmp_path):
            pass


@contextmanager
def another_run(folder: Path) -> Iterator[int]:
    """A process that writes a run's folder, and has forked a worker; both are ended afterwards."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(folder):
            worker = os.fork()
            if worker:
                os.write(writing, str(worker).encode())
            signal.pause()
        os._exit(0)
    worker = int(os.read(reading, 32))
    try:
        yield process
    finally:
        for each in (process, worker):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(process, 0)
        os.close(reading)
        os.close(writing)


def test_check_learns_a_batch_and_draws_what_the_network_sees(tmp_path, capsys):
    config = training_models.config("t2i_adapter", tmp_path, data={"condition": {"detector": "canny"}}, batch=4)
    assert check(config, print)
    told = capsys.readouterr().out
    assert "learned" in told
    assert "s a step" in told
    assert Image.open(tmp_path / "check.png").size[0] == 1280
    assert not (tmp_path / "checkpoints").exists()
    train(config)


@pytest.mark.heavy
def test_a_batch_is_found_that_fits(tmp_path):
    config = training_models.config("t2i_adapter", tmp_path, batch="auto", steps=1)
    train(config)
    found = read(tmp_path / "config.yaml")
    assert found.batch >= 1
    assert found.micro_batch == found.batch
    assert train(config.model_copy(update={"steps": 2}), resume=True)


def test_out_of_memory_names_levers(tmp_path, monkeypatch):
    from diffusion_kit.training.parallel.replicated import Replicated

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Replicated, "backward", full)
    with pytest.raises(
        MemoryError, match=r"2 pictures at once do not fit into memory; try micro_batch=1 .*precision=bf16"
    ):
        train(training_models.config("t2i_adapter", tmp_path))


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_configuration_that_comes_along_is_whole(file):
    config = read(file)
    assert config.data.sources
    detector = config.data.condition.detector
    if detector is not None:
        module = detectors.detector(detector)
        detectors.check_options(detector, module, dict(config.data.condition.options))


def test_numbers_and_words_that_yaml_reads_otherwise(tmp_path):
    """A bare `no` is false in YAML, and 1e-5 is a text."""
    file = written(tmp_path, training_models.config("t2i_adapter", tmp_path / "run"))
    config = read(file, ["precision=no", "optimizer.learning_rate=1e-5"])
    assert (config.precision, config.optimizer.learning_rate) == ("no", 1e-5)
