"""`diffusion-kit bench`: its cases and its tables; the runs themselves are `scripts/verify bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import lines, make_adapter, pipeline

from diffusion_kit.benchmark import contenders, interleaved, report
from diffusion_kit.benchmark.cases import Case
from diffusion_kit.benchmark.interleaved import Row, counted, step_seconds
from diffusion_kit.benchmark.report import compared, lines_of, summary
from diffusion_kit.cli import main
from diffusion_kit.models import onednn


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is twice as busy in a round is so for both."""
    busy = [1.0, 2.0, 1.0, 4.0, 1.0]
    assert compared([0.5 * b for b in busy], busy) == (2.0, 2.0, 2.0)


def test_a_step_is_one_after_the_first() -> None:
    """The first makes what a long run needs once."""
    case = Case(steps=4)
    assert step_seconds(10.0, [5.0, 6.0, 7.0, 8.0], case) == 1.0
    assert step_seconds(10.0, [], case) == 2.5


def test_a_table_has_every_contender() -> None:
    case = Case(controls=("controlnet",), steps=2)
    rows = [
        Row("diffusers", [3.0], [1.0], flops=4 * 10**9, operations=100, peak=10**9, anonymous=10**8, error=0.0),
        Row("exact packed", [1.0], [0.5], peak=10**9, anonymous=10**8, error=1e-6),
        Row("openvino alone", absent="the UNet alone, without controls"),
    ]
    text = "\n".join(lines_of(summary(case, rows, 10**10)))
    assert (
        "| diffusers | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 1,000 [1,000, 1,000] | 2 | 50 | 13 % | 1,000 |" in text
    )
    assert "| exact packed | 2.00 [2.00, 2.00] | 3.00 [3.00, 3.00] | 500 [500, 500] |" in text
    assert "| openvino alone | the UNet alone, without controls |" in text


def test_the_share_of_the_peak_is_of_the_work_of_the_own_level() -> None:
    """Fast does less than half."""
    rows = [
        Row("half eager", [1.0], [1.0], flops=8),
        Row("fast eager", [1.0], [1.0], flops=2),
        Row("fast packed", [0.5], [0.5]),
    ]
    found = summary(Case(dtype="bfloat16", steps=1), rows, 8.0)["contenders"]
    assert [own["share"] for own in found.values()] == [1.0, 0.25, 0.5]


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionXLAdapterPipeline"])
def test_every_pipeline_of_the_peer_tells_of_its_steps(name: str) -> None:
    """That of T2I-Adapters has an older callback than the others."""
    more = {"adapter": make_adapter()} if "Adapter" in name else {}
    pipe = pipeline(getattr(diffusers, name), **more)
    call = {"prompt": "a fox", "num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
    done = contenders.running(pipe, Case(steps=3), {**call, **({"image": lines()} if more else {})})()
    assert len(done.ends) == 3
    assert done.ends == sorted(done.ends)
    assert done.latents.shape == (1, 4, 16, 16)


def test_attention_is_counted() -> None:
    q = torch.randn(1, 2, 256, 32)
    found = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), "exact eager")
    assert found["flops"] == 2 * 2 * 2 * 256 * 256 * 32


def test_a_contender_that_dies_is_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fake:
        """Its second run ends the process of one of them."""

        def __init__(self, name: str, *_: Any) -> None:
            self.name, self.runs = name, 0

        def ask(self, what: str) -> dict[str, Any]:
            if what == "load":
                return {"latents": torch.ones(2), "ready": 0.1, "peak": 5}
            self.runs += 1
            if self.name == "a" and self.runs == 2:
                return {"absent": "its process ended with -9"}
            return {"seconds": [1.0], "steps": [0.5]}

        def stop(self) -> None:
            pass

    monkeypatch.setattr(interleaved, "Subject", Fake)
    monkeypatch.setattr(interleaved, "absent", lambda name, case: None)
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(tmp_path))
    first, second, third = interleaved.compare(Case(), ["diffusers", "a", "b openvino"], tmp_path, 3)
    assert first.seconds == third.seconds == [1.0] * 3
    assert first.steps == [0.5] * 3
    assert (second.absent, second.error) == ("its process ended with -9", None)
    assert (first.converting, third.converting, third.error) == (None, 5, 0.0)
    made = summary(Case(), [first, second, third], 1.0)
    assert "ratio" not in made["contenders"]["a"]
    assert "ratio" in made["contenders"]["b openvino"]
    assert "| a | its process ended with -9 |" in "\n".join(lines_of(made))


def test_results_are_used_again_for_the_same_question_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", "")
    monkeypatch.setattr(report, "model_folder", lambda *_: tmp_path)
    monkeypatch.setattr(report, "machine_peak", lambda *_: 1.0)
    monkeypatch.setattr(
        report, "compare", lambda case, names, *_: (asked.append(names), [Row(n, [1.0], [1.0]) for n in names])[1]
    )
    out = tmp_path / "results.json"
    for names, rounds, runs in ((["a"], 7, 1), (["a"], 7, 1), (["a", "b"], 7, 2), (["a", "b"], 3, 3)):
        (found,) = report.measured([Case()], names, out, rounds)
        assert list(found["contenders"]) == names
        assert len(asked) == runs
    assert len(report.kept(out)) == 1
    dead = json.loads(out.read_text())
    dead[0]["contenders"]["a"]["absent"] = "its process ended with -9"
    out.write_text(json.dumps(dead))
    report.measured([Case()], ["a", "b"], out, 3)
    assert len(asked) == 4, "the next time it may live"
    monkeypatch.setattr(report, "code", lambda: "other sources")
    report.measured([Case()], ["a", "b"], out, 3, older=True)
    assert len(asked) == 4, "what is there is good enough until there is all"
    report.measured([Case()], ["a", "b"], out, 3)
    assert len(asked) == 5
    here = report.machine()
    monkeypatch.setattr(report, "machine", lambda: here | {"processor": "another"})
    report.measured([Case()], ["a"], out, 3)
    assert len(report.kept(out)) == 2, "another machine's results stay"
    text = report.page(report.kept(out), "a command")
    assert text.index(f"## {here['processor']}, ") < text.index("## another, ")
    assert text.count("| a | ") == 2


def test_no_contender_runs_in_what_the_cpu_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: False)
    for name in contenders.names_on("cpu"):
        assert contenders.absent(name, Case(dtype="bfloat16")) is not None, name
    assert contenders.absent("diffusers", Case()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "tiny"], "--width is 'tiny'; it must be one of small, medium, large"),
        (["--controls", "plain", "--controls", "cany"], "--controls has 'cany'; there are plain, "),
        (["--dtype", "float8"], "--dtype is 'float8'; it must be one of float32, bfloat16"),
        (["--rounds", "0"], "--rounds is 0; it must be 1 or more"),
        (["--threads", "1", "--threads", "0"], "--threads is 0; it must be 1 or more"),
        (["--only", "pakced"], "--only is 'pakced'; there are diffusers, "),
        (["--out", "no/where.json"], "there is no folder no"),
        (["--out", "."], "--out . is a folder"),
        (["--out", "damaged.json"], "damaged.json holds no results of `diffusion-kit bench`"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", "")
    (tmp_path / "damaged.json").write_text('{"a": ')
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
