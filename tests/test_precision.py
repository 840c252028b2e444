"""What a training says of its precision, and what helps where numbers are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_models
from torch import nn

from diffusion_kit.training import precision
from diffusion_kit.training.config import Config, parse
from diffusion_kit.training.group import join
from diffusion_kit.training.parallel.zero import Zero
from diffusion_kit.training.train import make_trainer, train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(**own: Any) -> Config:
    return parse({"target": "unet", "output": "x", "steps": 1, **own}, "test")


# TF32


@pytest.fixture
def _flags() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_flags")
def test_tf32_is_set_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    join(config())
    assert precision.told(config(), GPU).endswith("float32 matrices in float32, convolutions in TF32"), (
        "as torch has it"
    )
    for wanted, name in ((True, "TF32"), (False, "float32")):
        own = config(tf32=wanted)
        join(own)
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
        assert torch.get_float32_matmul_precision() == ("high" if wanted else "highest")
        told = precision.told(own, GPU)
        assert told == (
            f"precision: networks run in float32; products of float32 matrices in {name}, convolutions in {name}"
        )


def test_tf32_has_no_effect_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.told(config(), CPU) == "precision: networks run in float32"
    assert precision.told(config(precision="bf16"), CPU) == "precision: networks run in bfloat16, sums in float32"
    assert precision.told(config(tf32=True), CPU).endswith("; tf32 has no effect on a CPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert precision.told(config(tf32=True), GPU).endswith("tf32 has no effect on this GPU, which is older than Ampere")


@pytest.mark.usefixtures("_flags")
def test_a_training_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(training_models.config("t2i_adapter", tmp_path / "run", steps=1, tf32=True))
    lines = capsys.readouterr().out.splitlines()
    assert "precision: networks run in float32; tf32 has no effect on a CPU" in lines


# What helps


def told_by(own: Any) -> list[str]:
    """What a run says that ends because nothing is finite."""
    told: list[str] = []
    own.say = told.append
    with pytest.raises(RuntimeError) as error:
        own.run(lambda _: False)
    return [*told, str(error.value)]


def trainer(folder: Path, **own: Any) -> Any:
    plain = training_models.config("t2i_adapter", folder, steps=60)
    made = make_trainer(plain, join(plain), lambda line: None)
    made.config = plain.model_copy(update=own)
    return made


def spoil(own: Any, factor: float) -> None:
    """Every gradient, from now on."""
    next(iter(own.parallel.pieces().values())).register_hook(lambda gradient: gradient * factor)


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    spoil(own, float("nan"))
    *told, last = told_by(own)
    helps = [line for line in told if "one after the other" in line]
    assert helps == [
        "the gradient was not finite in 3 steps one after the other: lower optimizer.learning_rate, "
        "look at the pictures that are named"
    ]
    assert last.startswith("the gradient was not finite in 20 steps one after the other: lower optimizer.learning_rate")
    assert told.index(helps[0]) == 3, "after three steps that were left out"


def test_a_loss_scale_that_cannot_fall_further(tmp_path: Path) -> None:
    """Overflows are no trouble while the scale falls: 2^30 to 1 takes more steps than a run waits for a finite one."""
    own = trainer(tmp_path, precision="fp16")
    own.parallel.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    spoil(own, float("inf"))
    *told, last = told_by(own)
    assert own.step == 30 + 20 - 1, "the trouble began when the scale was below 1"
    helps = [line for line in told if "one after the other" in line]
    assert helps == [
        "the gradient was not finite in 3 steps one after the other: the loss scale cannot become smaller: "
        "take precision=bf16 or no"
    ]
    assert last.endswith("take precision=bf16 or no")


def test_what_helps_is_said_once(tmp_path: Path) -> None:
    own = trainer(tmp_path)
    told: list[str] = []
    own.say = told.append
    for finite in (False,) * 4 + (True,) + (False,) * 4:
        own._note([SimpleNamespace(name="a", weight=1.0)], torch.tensor([[1.0, 0.5, 1.0]]), finite)
    assert sum("one after the other" in line for line in told) == 1
    assert sum("the step is left out" in line for line in told) == 8


@pytest.mark.parametrize(
    ("own", "what", "helps"),
    [
        ({"precision": "fp16"}, "loss", "learning_rate, look at the pictures that are named, or take precision=bf16"),
        ({"precision": "bf16"}, "gradient", "look at the pictures that are named, or take precision=no"),
        ({"precision": "fp16", "deepspeed": {}}, "gradient", "raise fp16.initial_scale_power to 32, or take precision"),
        ({"precision": "fp16", "deepspeed": {"fp16": {"loss_scale": 128}}}, "gradient", "set fp16.loss_scale to 0, or"),
    ],
)
def test_what_helps(own: dict[str, Any], what: str, helps: str) -> None:
    assert helps in precision.cure(config(**own), what)


class Engine:
    """DeepSpeed's, in half precision, with gradients that are always too large."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    def fp16_enabled(self) -> bool:
        return True

    def step(self) -> None:
        self.steps += 1
        own = self.optimizer
        if hasattr(own, "loss_scaler") and own.loss_scaler.dynamic:
            own.loss_scaler.cur_scale = max(own.loss_scaler.cur_scale / 2, own.loss_scaler.min_scale)
        elif hasattr(own, "loss_scale_config"):
            config = own.loss_scale_config
            config.cur_scale = max(config.cur_scale / 2, config.min_loss_scale)

    def was_step_applied(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("optimizer", "patient"),
    [
        ({"loss_scaler": SimpleNamespace(dynamic=True, cur_scale=8.0, min_scale=1.0)}, 3),
        ({"loss_scaler": SimpleNamespace(dynamic=False, cur_scale=8.0)}, 0),
        ({"loss_scale_config": SimpleNamespace(dynamic_loss_scale=True, cur_scale=8.0, min_loss_scale=1.0)}, 3),
    ],
)
def test_deepspeeds_loss_scale(optimizer: dict[str, Any], patient: int) -> None:
    """A step counts as lost only when the scale stays where it is."""
    own = Zero.__new__(Zero)
    own.optimizer = SimpleNamespace(**optimizer)
    own.engine, own.named = Engine(own.optimizer), {"a": nn.Parameter(torch.zeros(1))}  # type: ignore[assignment]
    assert [own.update() for _ in range(5)] == [True] * patient + [False] * (5 - patient)
    assert own.engine.steps == 5, "it steps always: so it finds its scale"
