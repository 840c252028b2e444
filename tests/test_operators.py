"""What is done before a run with DeepSpeed: operators are compiled, offload to a disk is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs

from diffusion_kit.cli import main
from diffusion_kit.training.config import parse
from diffusion_kit.training.parallel import aio, operators


def needed(zero: dict[str, Any], cpu: bool = True, **more: Any) -> list[str]:
    own = {"zero_optimization": zero, **more}
    return operators.needed(parse({"target": "unet", "output": "x", "steps": 1, "deepspeed": own}, "test"), cpu)


SHARED = "ShareMemCommBuilder"
NVME = ["PinMemoryBuilder", "AsyncIOBuilder"]


@pytest.mark.parametrize(
    ("zero", "more", "builders"),
    [
        ({"stage": 2}, {}, [SHARED]),
        ({"stage": 2}, {"cpu": False}, []),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, {}, [SHARED]),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, [SHARED, "CPUAdamBuilder"]),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}, [SHARED]),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, [SHARED, "CPUAdamBuilder", *NVME]),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {"cpu": False}, NVME),
        ({"stage": 1}, {"optimizer": {"type": "AdamW"}}, [SHARED, "FusedAdamBuilder"]),
        ({"stage": 1}, {"optimizer": {"type": "Adam", "params": {"torch_adam": True}}}, [SHARED]),
        ({"stage": 1}, {"optimizer": {"type": "Lamb"}}, [SHARED, "FusedLambBuilder"]),
        ({"stage": 1}, {"optimizer": {"type": "OneBitAdam"}}, [SHARED]),
        ({"stage": 3, "zero_quantized_weights": True}, {"cpu": False}, ["QuantizerBuilder"]),
    ],
)
def test_operators_of_a_configuration(zero: dict[str, Any], more: dict[str, Any], builders: list[str]) -> None:
    assert needed(zero, **more) == builders


def test_what_an_operator_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    own = SimpleNamespace(name="async_io", is_compatible=lambda: True, error_log=None)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operators.missing(own) is None
    own.is_compatible = lambda: False
    assert operators.missing(own) == "there is no libaio: apt install libaio-dev"
    assert operators.missing(SimpleNamespace(**{**vars(own), "name": "cpu_adam"})) == (
        "this machine is not one that it is made for"
    )
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert operators.missing(own) == "there is no ninja: pip install ninja"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"^deepspeed's async_io cannot be compiled: there is no compiler c\+\+: [^\n]+$"
    ):
        operators.load(own)


def test_a_compilers_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(verbose: bool) -> None:
        raise RuntimeError("Error building extension 'x':\n[1/2] c++ ...\nx.cpp:1:2: error: no\n")

    monkeypatch.setattr(operators, "missing", lambda own: None)
    with pytest.raises(RuntimeError, match=r"^deepspeed's x could not be compiled: x.cpp:1:2: error: no$"):
        operators.load(SimpleNamespace(name="x", load=fails))


# The disk


class Handle:
    """A disk on which 32 requests at once are fast, and two threads slow."""

    def __init__(self, log: list[Any], *way: Any) -> None:
        self.log, self.seconds = log, 1.0 / (1 + (way[1] == 32) - 0.5 * (way[4] == 2))
        log.append(way)

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        return like

    def free_cpu_locked_tensor(self, buffer: torch.Tensor) -> None:
        self.log.append("freed")

    def async_pwrite(self, buffer: torch.Tensor, file: str, offset: int) -> int:
        Path(file).touch()
        return 0

    def async_pread(self, buffer: torch.Tensor, file: str, offset: int) -> int:
        return 0

    def wait(self) -> int:
        CLOCK[0] += self.seconds
        return 1


CLOCK = [0.0]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    log: list[Any] = []
    monkeypatch.setattr(aio, "builder", lambda name: name)
    monkeypatch.setattr(aio, "load", lambda name: SimpleNamespace(aio_handle=lambda *way: Handle(log, *way)))
    monkeypatch.setattr(aio.time, "perf_counter", lambda: CLOCK[0])
    return log


def test_the_fastest_way_is_found(tried: list[Any], tmp_path: Path) -> None:
    told: list[str] = []
    best = aio.tune(tmp_path, told.append)
    assert best == {
        "block_size": 2**18,
        "queue_depth": 32,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
    }
    assert len(told) == aio.count() == tried.count("freed")
    assert "written at" in told[0]
    assert not list(tmp_path.iterdir()), "nothing stays"
    from diffusion_kit.training.parallel.settings import read

    assert read({"aio": best})["aio"] == best, "keys that DeepSpeed knows"


def test_folders_that_cannot_be_measured(tried: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no folder .*: name one on the NVMe, as nvme_path does$"):
        aio.tune(tmp_path / "none", print)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match="has 1 MiB left, and 128 are needed"):
        aio.tune(tmp_path, print)
    monkeypatch.undo()
    monkeypatch.setattr(Handle, "wait", lambda self: -1)
    with pytest.raises(RuntimeError, match="takes no direct transfers"):
        aio.timed(Handle([], 1, 1, False, True, 1), torch.empty(0), tmp_path / "transfer")


# The command


@pytest.fixture
def launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}')
    file = tmp_path / "edges.yaml"
    file.write_text(f"target: unet\nsteps: 1\noutput: {tmp_path}/run\n")

    def run(*more: str) -> tuple[int, str, str]:
        code = main(["launch", str(file), *more])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_a_dry_run_names_what_it_would_do(launched: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    own = f"deepspeed={tmp_path}/zero.json"
    code, out, _ = launched(own, "--prebuild", "--tune-aio", "disk", "--dry-run")
    assert code == 0
    assert "CPUAdamBuilder PinMemoryBuilder AsyncIOBuilder" in out
    assert out.splitlines()[1] == f"{aio.count()} ways to write and read 64 MiB in disk"
    code, _, err = launched("--prebuild")
    assert (code, err) == (
        2,
        "diffusion-kit: the configuration has no deepspeed, for which --prebuild and --tune-aio are\n",
    )


def test_really(launched: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where operators are compiled already: a bare machine takes minutes for each."""
    needs("deepspeed", "scale")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    if not [*root.rglob("async_io.so")] or subprocess.run(["c++", "--version"], check=False).returncode:
        pytest.skip("async_io is not compiled yet: scripts/verify scale does")
    monkeypatch.setattr(aio, "WAYS", {name: values[:1] for name, values in aio.WAYS.items()})
    code, out, err = launched(f"deepspeed={tmp_path}/zero.json", "--prebuild", "--tune-aio", str(tmp_path))
    assert code == 0, err
    assert "all 4 operators that this training needs are there" in out
    assert out.rstrip().endswith("}")
