"""The benchmark of training does what it says: the reference learns the same, and asks for more FLOPs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import training_models

FILE = Path(__file__).parents[1] / "benchmarks" / "training_speed.py"
spec = importlib.util.spec_from_file_location("training_speed", FILE)
assert spec is not None
assert spec.loader is not None
speed = importlib.util.module_from_spec(spec)
sys.modules["training_speed"] = speed
spec.loader.exec_module(speed)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "SIDE", 64)
    monkeypatch.setattr(speed, "BATCH", 2)
    monkeypatch.setattr(speed, "RATE", 1e-3)
    return lambda: speed.arms(tmp_path, training_models.base(), training_models.data())


@pytest.mark.heavy
def test_ten_steps_have_the_losses_of_the_reference(small):
    arms, last = small(), speed.STEPS - 1
    losses = {name: [step(k) for k in range(speed.STEPS)] for name, step in arms.steps.items()}
    assert max(speed.worst(losses).values()) < speed.TOLERANCE
    untrained = small().steps["reference"](last)
    assert abs(untrained / losses["reference"][last] - 1) > 1e-2


def test_the_reference_asks_for_more_flops(small):
    arms = small()
    found = speed.ratios({name: speed.flops(lambda name=name: arms.steps[name](0)) for name in arms.steps})
    assert 1.2 < found["kit"] < found["cached"]


@pytest.mark.heavy
def test_of_sdxl_at_1024_pixels_it_asks_for_as_much_as_was_said():
    found = speed.ratios(speed.sdxl_flops())
    assert found == pytest.approx({"kit": 1.31, "cached": 1.74}, abs=0.01)
