"""A run that was interrupted ends with the same bits; `scripts/verify resume` kills whole runs at every kind of moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import training_models
from safetensors.torch import load_file

from diffusion_kit import cli
from diffusion_kit.training import caching, checkpoints, run, validation
from diffusion_kit.training.data.samples import Pictures, open_pictures
from diffusion_kit.training.train import train

RUN = {
    "steps": 6,
    "batch": 4,
    "micro_batch": 2,
    "ema": 0.9,
    "optimizer": {"schedule": "cosine", "warmup_steps": 1, "learning_rate": 1e-3},
    "data": {"buckets": 2, "bucket_step": 16, "flip": 0.5, "crop": "random", "crops": 3},
    "dropout": {"caption": 0.3, "condition": 0.3},
    "checkpoints": {"every": 2, "keep": 5},
}


def files(folder: Path, step: int) -> dict:
    own = checkpoints.folder_of(folder / "checkpoints", step)
    tensors = {file.stem: load_file(file) for file in own.glob("*.safetensors")}
    return tensors | {"state": json.loads((own / "state.json").read_text())}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[part][name], b[part][name]) for part in a if part != "state" for name in a[part])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(training_models.config("t2i_adapter", folder, **RUN))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, undisturbed, workers, monkeypatch):
    config = training_models.config("t2i_adapter", tmp_path, **{**RUN, "data": {**RUN["data"], "workers": workers}})
    monkeypatch.setattr(run.Run, "log", stop_at(3))
    assert train(config) is None
    monkeypatch.undo()
    assert [folder.name for folder in checkpoints.whole(tmp_path / "checkpoints")] == ["step-00000002", "step-00000003"]
    train(config, resume=True)
    a, b = files(undisturbed, 6), files(tmp_path, 6)
    assert a.keys() == b.keys()
    assert same(a, b)
    assert a["state"] == b["state"]
    assert (undisturbed / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text()
    for own in ("weights", "optimizer", "ema"):
        assert not same({own: a[own]}, {own: files(undisturbed, 4)[own]})


def stop_at(step: int, number: int = signal.SIGTERM):
    """A log that sends the process and its workers a signal after a step, as a cluster or Ctrl-C does."""
    log = run.Run.log

    def logged(self: run.Run, name: str, row: dict) -> None:
        log(self, name, row)
        if row["step"] == step and name == "metrics":
            for worker in multiprocessing.active_children():
                os.kill(int(worker.pid or 0), number)
            os.kill(os.getpid(), number)

    return logged


@pytest.fixture
def heard():
    """The test may itself run in the background, where a shell lets processes ignore some signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in run.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, monkeypatch, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(training_models.config("t2i_adapter", tmp_path / "run", steps=5).dump())
    monkeypatch.setattr(run.Run, "log", stop_at(2, number))
    monkeypatch.setattr("sys.argv", ["diffusion-kit", "train", str(file), "seed=0"])
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", str(file), "seed=0"])
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"stopped at step 2 of 5; go on with: diffusion-kit train {file} seed=0 --resume"
    monkeypatch.undo()
    assert cli.main(told.partition("diffusion-kit ")[2].split()) == 0
    assert (tmp_path / "run" / "result" / "config.json").is_file()


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_cache_is_filled_stops_at_once_and_keeps_it(tmp_path, number, monkeypatch, capsys):
    file = tmp_path / "config.yaml"
    own = training_models.config("t2i_adapter", tmp_path / "run", steps=2, cache={"folder": str(tmp_path / "cache")})
    file.write_text(own.dump())
    keep, pixels = caching.keep, Pictures.pixels
    monkeypatch.setattr(caching, "TOGETHER", (8 * 1024**2, 2))
    monkeypatch.setattr(caching, "keep", lambda *given: (keep(*given), os.kill(os.getpid(), number)))
    monkeypatch.setattr("sys.argv", ["diffusion-kit", "train", str(file)])
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", str(file)])
    told = capsys.readouterr().out
    assert f"stopped before the first step; go on with: diffusion-kit train {file} --resume" in told
    monkeypatch.undo()
    # Where a picture is read, whatever goes wrong is the picture's fault; a signal is not.
    monkeypatch.setattr(Pictures, "pixels", lambda *given: (os.kill(os.getpid(), number), pixels(*given))[1])
    assert cli.main(["cache", str(file)]) == 1
    told = capsys.readouterr()
    assert "the same command goes on" in told.err
    assert "left out" not in told.out
    monkeypatch.undo()
    assert cli.main(["train", str(file), "--resume"]) == 0
    assert f"{len(open_pictures(own, True)) - 2} views are new" in capsys.readouterr().out


def test_a_validation_that_was_due_when_a_run_was_stopped_is_made_when_it_goes_on(tmp_path, monkeypatch):
    more = {"validation": {"every": 2, "pictures": 1, "steps": 1}, "steps": 3}
    whole, stopped = (training_models.config("t2i_adapter", tmp_path / name, **more) for name in ("whole", "stopped"))
    train(whole)
    monkeypatch.setattr(run.Run, "log", stop_at(2))
    assert train(stopped) is None
    monkeypatch.undo()
    assert not run.Run(tmp_path / "stopped").validations()
    train(stopped, resume=True)
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert a == b
    assert list(run.Run(tmp_path / "whole").validations()) == [2, 3]


@pytest.mark.usefixtures("heard")
def test_a_signal_breaks_off_a_validation_which_is_made_when_the_run_goes_on(tmp_path, monkeypatch, capsys):
    more = {"validation": {"every": 2, "pictures": 1, "steps": 1}, "steps": 4}
    whole, stopped = (training_models.config("t2i_adapter", tmp_path / name, **more) for name in ("whole", "stopped"))
    train(whole)
    for step in (2, 4):  # the second is the last
        monkeypatch.setattr(validation, "show", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(stopped, resume=step > 2, command=["diffusion-kit", "train", "x"]) is None
        assert f"stopped at step {step} of 4; go on with: diffusion-kit train x" in capsys.readouterr().out
        monkeypatch.undo()
        assert step not in run.Run(tmp_path / "stopped").validations()
        if step == 2:
            monkeypatch.setattr(run.Run, "log", stop_at(3))
            assert train(stopped, resume=True) is None
            monkeypatch.undo()
    assert train(stopped, resume=True) is not None
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped"))
    assert a == b


@pytest.mark.usefixtures("heard")
def test_a_second_interrupt_does_not_wait_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    config = training_models.config("t2i_adapter", tmp_path, steps=5, checkpoints={"every": 2})
    log = run.Run.log

    def twice(self, name, row):
        log(self, name, row)
        if row.get("step") == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run.Run, "log", twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, command=["diffusion-kit", "train", "x"])
    told = capsys.readouterr().out
    assert "stops after this step; a second Ctrl-C does not wait for it" in told
    assert "interrupted; go on from the last checkpoint with: diffusion-kit train x --resume" in told
    monkeypatch.undo()
    train(config, resume=True)
    assert "goes on at step 2 of 5" in capsys.readouterr().out


def test_what_a_process_was_started_to_ignore_it_goes_on_ignoring():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_in_another_thread_hears_no_signals(tmp_path):
    made = []
    thread = threading.Thread(
        target=lambda: made.append(train(training_models.config("t2i_adapter", tmp_path, steps=1)))
    )
    thread.start()
    thread.join()
    assert made == [tmp_path / "result"]


def test_another_environment_is_told(tmp_path, capsys, monkeypatch):
    train(training_models.config("t2i_adapter", tmp_path, steps=1))
    own = run.environment(1)
    monkeypatch.setattr(run, "environment", lambda processes: {**own, "threads": 7, "torch": "9.9"})
    train(training_models.config("t2i_adapter", tmp_path, steps=2), resume=True)
    told = capsys.readouterr().out
    assert f"threads was {own['threads']}, is 7" in told
    assert f"torch was {own['torch']}, is 9.9" in told
    assert "diffusers was" not in told


def test_a_removal_that_was_interrupted_is_made_good(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, step, checkpoints.Checkpoint({"weights": {"w": torch.zeros(3)}}, {"step": step}))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(tmp_path, 2)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    checkpoints.prune(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
