"""What is written of a checkpoint is what the run itself would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_models
from safetensors.torch import load_file

from diffusion_kit.cli import main
from diffusion_kit.training import checkpoints, consolidate, run
from diffusion_kit.training.train import train

RANK = {"control_lora": {"rank": 4}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("target", "family"),
    [("t2i_adapter", "sdxl"), ("controlnet", "sdxl"), ("control_lora", "sdxl"), ("hint_decoder", "kandinsky")],
)
def test_it_is_the_result_of_the_run(tmp_path: Path, target: str, family: str) -> None:
    own = {"network": RANK.get(target, {}), "ema": 0.5, "steps": 2}
    result = train(training_models.config(target, tmp_path / "run", family, **own))
    assert main(["weights", "consolidate", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = weights(tmp_path / "out"), weights(result)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_of_a_schedule_free_run_it_is_what_was_learned(tmp_path: Path) -> None:
    """Not the weights at which the next gradient would be taken, which the checkpoint has."""
    own = {"optimizer": {"name": "schedule_free", "learning_rate": 1e-2}, "steps": 3}
    result = train(training_models.config("t2i_adapter", tmp_path / "run", **own))
    consolidate.consolidate(tmp_path / "run", tmp_path / "out")
    consolidate.consolidate(tmp_path / "run", tmp_path / "plain", averaged=False)
    ours, theirs, plain = (weights(folder) for folder in (tmp_path / "out", result, tmp_path / "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(plain[name], theirs[name]) for name in theirs)


def test_the_best_the_plain_and_halves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(training_models.config("controlnet", folder, ema=0.5, steps=3, checkpoints={"every": 1, "keep": 3}))
    rows = [{"step": step, "validation": {"fidelity": value}} for step, value in ((1, 0.2), (2, 0.9), (3, 0.5))]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {}
    for which in ("best", "2", "last"):
        out = tmp_path / which
        made[which] = consolidate.consolidate(folder, out, which=which, averaged=False, dtype=torch.bfloat16)
    assert (made["best"].name, made["last"].name) == ("step-00000002", "step-00000003")
    whole = load_file(made["best"] / "weights.safetensors")
    best, second = weights(tmp_path / "best"), weights(tmp_path / "2")
    for full, value in best.items():
        name = full.partition(":")[2]
        assert torch.equal(value, whole[f"controlnet.{name}"].to(torch.bfloat16))
        assert torch.equal(value, second[full])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no run": ({"run": Path("nowhere")}, "nowhere is no run: it has no config.yaml"),
    "no checkpoint": ({"which": "7"}, "has no whole checkpoint 7; there are 1"),
    "no word": ({"which": "newest"}, "has no whole checkpoint newest; there are 1"),
    "no best": ({"which": "best"}, "has no best checkpoint: no validation measured"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(training_models.config("t2i_adapter", folder, steps=1))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(trained: Path, tmp_path: Path, name: str) -> None:
    more, told = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        consolidate.consolidate(**{"run": trained, "out": tmp_path / "out", **more})
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_told_before_anything_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidate, "limit", lambda device: 0)
    monkeypatch.setattr(consolidate, "make_target", None)
    with pytest.raises(MemoryError, match="GB are free"):
        consolidate.consolidate(trained, tmp_path / "out")


def test_what_is_there_is_kept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = trained / "result"
    before = sorted(result.iterdir())
    assert main(["weights", "consolidate", str(trained), "--out", str(result)]) == 2
    assert "is there already: give a new folder" in capsys.readouterr().err
    assert sorted(result.iterdir()) == before


def test_checkpoints_that_machines_do_not_share(tmp_path: Path) -> None:
    train(training_models.config("t2i_adapter", tmp_path / "run", steps=2, checkpoints={"every": 1}))
    root = tmp_path / "run/checkpoints"
    assert run.newest(root, lambda own: [own, [1]]).state["step"] == 1
    assert run.newest(tmp_path, lambda own: [own, []]) is None
    with pytest.raises(ValueError, match="no checkpoint that all machines have"):
        run.newest(root, lambda own: [own, []])


def test_a_run_goes_on_without_checkpoints_that_another_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep=1 one that is ahead would be kept in place of every one that both have."""
    config = training_models.config("t2i_adapter", tmp_path / "run", steps=3, checkpoints={"every": 1})
    train(config)
    root, there = tmp_path / "run/checkpoints", list[list[int]]()
    monkeypatch.setattr("diffusion_kit.training.train.gather_object", lambda own: [*own, [1]])

    def look(*_: Any) -> None:
        there.append([checkpoints.step_of(folder) for folder in checkpoints.whole(root)])

    monkeypatch.setattr(run.Run, "cut_logs", look)
    train(config.model_copy(update={"steps": 2}), resume=True)
    assert there == [[1]]
