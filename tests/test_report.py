"""What `diffusion-kit doctor --report` tells, and what it does not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from diffusion_kit.cli import main
from diffusion_kit.commands import report


def test_a_report_has_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.md"
    assert main(["doctor", "--report", str(file)]) == 0
    text = file.read_text()
    assert [*tmp_path.iterdir()] == [file]
    for part in ("System", "Packages", "Devices", "Environment", "Programs", "DeepSpeed's operators", "torch's build"):
        assert f"\n## {part}\n" in text
    assert f"| torch | {torch.__version__.partition('+')[0]}" in text
    for name in ("deepspeed", "ray", "accelerate", "kubectl", "sbatch", "mpirun", "limit of the control group"):
        assert f"\n| {name} | " in text
    capsys.readouterr()
    assert main(["doctor", "--report"]) == 0
    assert capsys.readouterr().out.startswith("# diffusion-kit doctor --report\n\n## System\n")


def test_a_report_tells_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/somebody/models")
    monkeypatch.setenv("MASTER_ADDR", "node7.example")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    text = report.report()
    for secret in ("somebody", "hf_secret", "node7", "HF_TOKEN"):
        assert secret not in text
    assert f" {socket.gethostname()} " not in text
    assert "| OMP_NUM_THREADS | `7` |" in text
    assert "| HF_HOME | set |" in text
    assert report.private("CXX=/home/somebody/bin/c++ /opt/home/somebody/x") == "CXX=~/bin/c++ /opt/home/somebody/x"


def test_the_limit_of_a_control_group(tmp_path: Path) -> None:
    assert report.limit(tmp_path) == "none"
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{3 * 2**30}\n")
    assert report.limit(tmp_path) == "3.0 GiB"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert report.limit(tmp_path) == "none"
