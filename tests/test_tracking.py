"""Who is told of a run: the ledger, by accelerate's interface; and what a run can be asked from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import training_models
from accelerate.tracking import GeneralTracker

from diffusion_kit.cli import main
from diffusion_kit.ledger import Ledger, evaluations, pictures, runs
from diffusion_kit.training import run, tracking
from diffusion_kit.training.train import train

SHORT: dict[str, Any] = {"steps": 4, "checkpoints": {"every": 2, "keep": 9}}
MEASURED: dict[str, Any] = {
    "validation": {"every": 2, "pictures": 1, "steps": 1},
    "data": {"condition": {"detector": "canny"}, "holdout": 1},
}


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_a_run_stands_in_the_ledger_as_in_its_folder(tmp_path: Path) -> None:
    train(
        training_models.config("t2i_adapter", tmp_path, **SHORT, **MEASURED), command=["diffusion-kit", "train", "c d"]
    )
    with Ledger().reading() as session:
        (own,) = runs.found(session)
        assert (own.state, own.step, own.steps, own.target) == (runs.ENDED, 4, 4, "t2i_adapter")
        assert own.command == "diffusion-kit train 'c d'"
        assert own.config["validation"]["pictures"] == 1
        loss = [(row["step"], row["loss"]) for row in rows(tmp_path) if "loss" in row]
        assert runs.curve(session, own.id, "loss") == loss
        fidelity = [(row["step"], row["validation"]["fidelity"]) for row in rows(tmp_path) if "validation" in row]
        assert runs.curve(session, own.id, "validation/fidelity") == fidelity
        sheets = pictures.search(session, pictures.Query(run=own.id), limit=9)
        assert {(Path(sheet.file).name, sheet.step) for sheet in sheets} == {
            (f"{group}.png", step) for group in ("seen", "unseen") for step in (2, 4)
        }
        assert {(found.measure, found.step) for found in evaluations.found(session, own.id)} == {
            ("edge F1", 2),
            ("edge F1", 4),
        }


def test_a_run_that_goes_on_is_the_same_run_with_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training_models.config("t2i_adapter", tmp_path, **SHORT)
    real = run.Run.asked
    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "asked", lambda self: {"stop"} if len(rows(self.folder)) == 3 else real(self))
        assert train(config) is None
    with Ledger().reading() as session:
        (own,) = runs.found(session)
        assert (own.state, own.step) == (runs.STOPPED, 3)
    train(config, resume=True)
    with Ledger().reading() as session:
        (again,) = runs.found(session)
        assert (again.id, again.state, again.started) == (own.id, runs.ENDED, own.started)
        assert [step for step, _ in runs.curve(session, own.id, "loss")] == [1, 2, 3, 4]


def test_the_ledger_changes_nothing_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that fails, which is told once."""
    told: list[str] = []
    monkeypatch.setattr(run.Run, "say", lambda self, line: told.append(line))
    folders = []
    for name, url, history in (
        ("with", "", True),
        ("without", "", False),
        ("broken", "sqlite:////proc/none/l.db", True),
    ):
        monkeypatch.setenv("DIFFUSION_KIT_LEDGER", url)
        train(training_models.config("t2i_adapter", tmp_path / name, **SHORT, history=history))
        folders.append(tmp_path / name)
    first, second, third = (rows(folder) for folder in folders)
    assert first == second == third
    assert sum("the history cannot be written" in line for line in told) == 1
    monkeypatch.setenv("DIFFUSION_KIT_LEDGER", "")
    with Ledger().reading() as session:
        assert [Path(own.folder).name for own in runs.found(session)] == ["with"]
    assert main(["history", "--rebuild", str(tmp_path)]) == 0
    with Ledger().reading() as session:
        assert {Path(own.folder).name for own in runs.found(session)} == {"with", "broken"}


def test_what_a_run_is_asked_it_does_after_the_step_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"steps": 5, "checkpoints": {"every": 100, "keep": 9}, "validation": {"pictures": 1, "steps": 1}}
    config = training_models.config("unet", tmp_path, **more)
    asks = {1: "save", 2: "validate", 4: "stop"}
    real = run.Run.log

    def log(self: run.Run, name: str, row: dict[str, Any]) -> None:
        real(self, name, row)
        if name == "metrics" and "loss" in row and row["step"] in asks:
            run.ask(self.folder, asks[row["step"]])

    monkeypatch.setattr(run.Run, "log", log)
    assert train(config) is None
    checkpoints = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000001", "step-00000002", "step-00000004"], "a validation has its own"
    assert [row["step"] for row in rows(tmp_path) if "validation" in row] == [2]
    assert not (tmp_path / run.ASKED).exists()


def test_what_nobody_can_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        run.ask(tmp_path, "save")
    with pytest.raises(ValueError, match="not to dance"):
        run.ask(tmp_path, "dance")


class Fragile(GeneralTracker):
    """A tracker of somebody else, whose server goes away."""

    name, requires_logging_directory = "fragile", False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["data.resolution"] == 64

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((step, values))
        if step == 2:
            raise ConnectionError("gone")

    def finish(self) -> None:
        self.seen.append((None, {}))


def test_other_trackers_are_told_the_same_and_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragile, told = Fragile(), list[str]()
    monkeypatch.setattr(run.Run, "say", lambda self, line: told.append(line))
    real = tracking.row_of

    def with_fragile(trainer: Any, own: Any, command: Any) -> Any:
        trainer.accelerator.log_with.append(fragile)
        return real(trainer, own, command)

    monkeypatch.setattr(tracking, "row_of", with_fragile)
    train(training_models.config("t2i_adapter", tmp_path, **SHORT))
    losses = [(step, values["loss"]) for step, values in fragile.seen if "loss" in values]
    assert losses == [(row["step"], row["loss"]) for row in rows(tmp_path)]
    assert fragile.seen[-1] == (None, {})
    assert sum("the tracker fragile failed: ConnectionError: gone" in line for line in told) == 1


def test_a_tracker_that_cannot_begin_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Fragile):
        name = "away"

        def start(self) -> None:
            raise ConnectionError("nobody answers")

    away, told, real = Away(), list[str](), tracking.row_of
    monkeypatch.setattr(run.Run, "say", lambda self, line: told.append(line))

    def with_away(trainer: Any, own: Any, command: Any) -> Any:
        trainer.accelerator.log_with.append(away)
        return real(trainer, own, command)

    monkeypatch.setattr(tracking, "row_of", with_away)
    train(training_models.config("t2i_adapter", tmp_path, **SHORT))
    assert [line for line in told if "the tracker away cannot begin (nobody answers)" in line]
    assert not away.seen
    assert rows(tmp_path)
    with Ledger().reading() as session:
        (found,) = runs.found(session)
        assert runs.last(session, found.id)["loss"] == rows(tmp_path)[-1]["loss"]


def test_a_tracker_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="trackers: wandb is not installed: pip install wandb"):
        tracking.check(training_models.config("unet", tmp_path, trackers=["wandb"]))
