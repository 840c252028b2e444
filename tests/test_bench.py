"""`diffusion-kit bench`: its cases and its tables; the runs themselves are `scripts/verify bench`."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_kit.benchmark.cases import Case
from diffusion_kit.benchmark.interleaved import Row
from diffusion_kit.benchmark.report import compared, lines_of, summary
from diffusion_kit.cli import main


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is twice as busy in a round is so for both."""
    busy = [1.0, 2.0, 1.0, 4.0, 1.0]
    ours, theirs = Row("exact eager", [0.5 * b for b in busy]), Row("diffusers", list(busy))
    assert compared(ours, theirs) == (2.0, 2.0, 2.0)


def test_a_table_has_every_contender() -> None:
    case = Case(controls=("controlnet",), steps=2)
    rows = [
        Row("diffusers", [2.0], flops=4 * 10**9, operations=100, peak=10**9, anonymous=10**8, error=0.0),
        Row("exact packed", [1.0], peak=10**9, anonymous=10**8, error=1e-6),
        Row("openvino alone", absent="the UNet alone, without controls"),
    ]
    text = "\n".join(lines_of(summary(case, rows, 10**10)))
    assert "| diffusers | 1.00 [1.00, 1.00] | 1,000 | 2 | 50 | 20 % | 1,000 | 100 |" in text
    assert "| exact packed | 2.00 [2.00, 2.00] | 500 |" in text
    assert "| openvino alone | the UNet alone, without controls |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "tiny"], "--width is 'tiny'; it must be one of small, medium, large"),
        (["--controls", "plain", "--controls", "cany"], "--controls has 'cany'; there are plain, "),
        (["--dtype", "float8"], "--dtype is 'float8'; it must be one of float32, bfloat16"),
        (["--rounds", "0"], "--rounds is 0; it must be 1 or more"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
