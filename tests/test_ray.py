"""Workers of Ray, really started. What needs no Ray is in test_shares.py."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from diffusion_kit.commands import workers
from diffusion_kit.commands.workers import Failed

pytestmark = pytest.mark.skipif(  # found, not imported: what it says is settled when it is
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed: scripts/verify scale installs it"
)
TESTS = Path(__file__).parent


def mortal(mark: str) -> Callable[[int], tuple[int, str]]:
    """A task that kills its worker the first time, one that is bad, and others."""

    def task(number: int) -> tuple[int, str]:
        if number == 2 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1:
            raise ValueError("a bad one")
        return number, os.getcwd()

    return task


def test_a_killed_workers_task_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent))))  # of the workers
    ready = partial(mortal, str(tmp_path / "mark"))
    found = list(workers.shared(range(5), ready, 2, gpu=False))
    assert (tmp_path / "mark").exists()
    assert found[1] == Failed("a bad one", True)
    assert [found[k] for k in (0, 2, 3, 4)] == [(k, str(tmp_path)) for k in (0, 2, 3, 4)]
    told = capfd.readouterr()
    assert not told.out
    assert "raylet" not in told.err
