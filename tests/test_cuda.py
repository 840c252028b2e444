"""What a GPU alone can show: `scripts/verify cuda` where there is one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_models
from conftest import components, distance, half_mask, lines, make_adapter, make_controlnet, make_vae, needs, pipeline
from peft import LoraConfig
from safetensors.torch import load_file
from test_mixtures import TASKS, run

from diffusion_kit import AutoPipelineForText2Image, Control, SDXLPipeline
from diffusion_kit.training.train import train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: scripts/verify cuda"),
]
ENGINES = ("cudagraph", "inductor")


def pipe(**replaced: Any) -> Any:
    parts = copy.deepcopy({**components(), "vae": make_vae(), **replaced})
    return pipeline(SDXLPipeline, **parts).to("cuda")


def controls() -> list[Control]:
    return [Control(make_adapter(), lines(1), mask=half_mask()), Control(make_controlnet(), lines(2), scale=0.7)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_task_under_two_controls(engine: str, task: str) -> None:
    plain, other = pipe(), pipe()
    other.optimize(engine=engine)
    assert distance(run(controls(), task, other), run(controls(), task, plain)) < 1e-3
    assert not other.engine.notes


@pytest.mark.parametrize("engine", ENGINES)
def test_a_window_is_two_graphs_and_a_scale_none(engine: str) -> None:
    plain, other = pipe(), pipe()
    other.optimize(engine=engine)
    for scale in (1.0, 0.3):
        own = [Control(make_adapter(), lines(1), scale=scale, end=0.5)]
        assert distance(run(own, pipe=other), run(own, pipe=plain)) < 1e-3
        assert len(other.engine.graphs) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lora_that_is_loaded_after_optimize_is_seen(engine: str) -> None:
    plain, other = pipe(), pipe()
    other.optimize(engine=engine)
    before = run(pipe=other)
    for own in (plain, other):
        torch.manual_seed(0)
        own.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
        own.unet.to("cuda")
    after = run(pipe=other)
    assert distance(after, before) > 1e-2
    assert distance(after, run(pipe=plain)) < 1e-3


def test_the_engine_is_chosen_by_a_measurement() -> None:
    told = pipe().optimize()
    assert "was the fastest over a block of the UNet" in told


def picture(own: Any, **more: Any) -> torch.Tensor:
    """(H, W, 3) in [0, 1] of the embedded model."""
    call = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 12, "output_type": "np"}
    return torch.from_numpy(own("a red apple on a blue background", **call, **more).images[0])


@pytest.mark.parametrize(("level", "most"), [("exact", 1e-3), ("half", 0.02), ("fast", 0.05)])
@pytest.mark.parametrize("low", [False, True])
def test_the_embedded_models_picture_is_that_of_a_cpu(level: str, most: float, low: bool) -> None:
    """Its mean difference, in the range of pixels."""
    plain = AutoPipelineForText2Image.from_pretrained("default")
    other = AutoPipelineForText2Image.from_pretrained("default").to("cuda")
    other.optimize(level, low_memory=low)
    assert (picture(other) - picture(plain)).abs().mean() < most
    if low:
        assert next(other.unet.parameters()).device.type == "cpu"


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic"])
def test_weights_of_8_bits(scheme: str) -> None:
    needs("torchao", "heavy")
    plain, other = (AutoPipelineForText2Image.from_pretrained("default").to("cuda") for _ in range(2))
    other.optimize("half", quantised=scheme)
    assert 1e-5 < (picture(other) - picture(plain)).abs().mean() < 0.05


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path, precision: str) -> None:
    def losses(folder: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    def made(folder: str, steps: int) -> Any:
        return training_models.config("controlnet", tmp_path / folder, steps=steps, precision=precision)

    whole = train(made("whole", 4))
    train(made("parts", 2))
    parts = train(made("parts", 4), resume=True)
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-3)
    first, second = (load_file(next(folder.glob("*.safetensors"))) for folder in (whole, parts))
    for name, weight in first.items():
        assert torch.isfinite(weight).all()
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=2e-3, msg=name)
