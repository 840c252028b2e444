"""What half precision and the step cache save and cost on the embedded model, beside runs of fewer steps.

python benchmarks/step_cache.py

64 held-out conditions of scripts/make_default, a seed each, 30 steps, on one thread. The exact picture is that of the whole
run in float32. Seconds are processor time without decoding; the arms of eight pictures follow one another.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_kit import AutoPipelineForText2Image, Control, detect
from diffusion_kit.evaluation.intervals import bootstrap
from diffusion_kit.evaluation.measures import measures_of
from diffusion_kit.pipelines.optimize import FAST

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts/make_default"))
STEPS, FEWER, BATCH, GUIDANCE = 30, (8, 9, 10, 11, 12, 13, 15), 8, 2.5
CONTROLS = ("canny", "canny_controlnet")  # a T2I-Adapter and a ControlNet
WITHIN = 1.02  # of the seconds of "fast": runs of fewer steps that count as equally long


@dataclass(frozen=True)
class Arm:
    name: str
    half: bool = True
    steps: int = STEPS
    cache: dict[str, Any] = field(default_factory=lambda: {"every": None})
    quantised: str | None = None
    interval: tuple[float, float] = (0.0, 1.0)  # of the run, in which there is guidance


def variants() -> list[Arm]:
    cached = [{"every": every, "guidance": how} for every in (2, 3, 4, 5, 6) for how in ("recompute", "reuse")]
    return [
        Arm("exact", half=False),
        Arm("half"),
        Arm("fast", cache=FAST),
        *(Arm(f"half, {steps} steps", steps=steps) for steps in FEWER),
        *(Arm(f"every {own['every']}, guidance {own['guidance']}", half=False, cache=own) for own in cached),
        Arm("every 4, controls recompute", half=False, cache={"every": 4, "controls": "recompute"}),
    ]


@cache
def loaded(half: bool, quantised: str | None) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained("default", torch_dtype=torch.bfloat16 if half else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if quantised is not None:
        pipe.optimize(engine="eager", quantised=quantised)
    return pipe


def made(arm: Arm, asked: list[Any], control: Control) -> tuple[float, np.ndarray]:
    """Seconds, and pictures (B, 64, 64, 3) in [0, 1]."""
    pipe = loaded(arm.half, arm.quantised)
    pipe.cache_steps(**arm.cache)
    generators = [torch.Generator().manual_seed(own.seed) for own in asked]
    call = {"guidance_scale": GUIDANCE, "generator": generators, "output_type": "latent"}
    call |= {"guidance_interval": arm.interval}
    start = time.process_time()
    latents = pipe([own.prompt for own in asked], controls=[control], num_inference_steps=arm.steps, **call).images
    seconds = time.process_time() - start
    return seconds, pipe.decode(latents, "np")


def measure(name: str, arms: list[Arm]) -> list[dict[str, Any]]:
    """A row for each arm, of which the first is exact, under the control of that name."""
    import conditions

    asked, compare = conditions.held_out(), measures_of("canny")[0].compare
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    decibels: dict[str, list[float]] = {arm.name: [] for arm in arms}
    followed: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for k in range(0, len(asked), BATCH):
        batch = asked[k : k + BATCH]
        found = [detect("canny", Image.fromarray(own.pixels)) for own in batch]
        exact = None
        for arm in arms:
            took, pictures = made(arm, batch, Control(name, found))
            exact = pictures if exact is None else exact
            seconds[arm.name].append(took)
            decibels[arm.name] += [psnr(a, b) for a, b in zip(pictures, exact, strict=True)]
            shown = [detect("canny", Image.fromarray((255 * own).round().astype(np.uint8))) for own in pictures]
            followed[arm.name] += [float(compare(a, b)) for a, b in zip(shown, found, strict=True)]
    return [row(arm.name, name, seconds, decibels, followed) for arm in arms]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of pictures in [0, 1], in dB; 99 for equal ones."""
    return min(99.0, float(-10 * np.log10(np.square(a - b).mean() + 1e-12)))


def row(arm: str, control: str, seconds: Any, decibels: Any, followed: Any) -> dict[str, Any]:
    """Speeds are medians over the batches, beside the whole run of the same precision ("half" also beside "exact")."""
    whole = "half" if arm == "fast" or arm.startswith("half, ") else "exact"
    ratios = np.array(seconds[whole]) / np.array(seconds[arm])
    change = np.array(followed[arm]) - np.array(followed["exact"])
    low, high = bootstrap(change)
    return {
        "controls": control,
        "run": arm,
        "beside": whole,
        "speed": round(float(np.median(ratios)), 2),
        "quartiles": [round(float(q), 2) for q in np.percentile(ratios, [25, 75])],
        "seconds": round(float(np.sum(seconds[arm])), 1),
        "psnr": round(float(np.median(decibels[arm])), 1),
        "edge F1": round(float(np.mean(followed[arm])), 4),
        "change of F1": [round(float(change.mean()), 4), round(float(low), 4), round(float(high), 4)],
    }


def bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for control in CONTROLS:
        own = {row["run"]: row for row in rows if row["controls"] == control}
        fast = own["fast"]
        equal = [r for name, r in own.items() if name.startswith("half, ") and r["seconds"] <= WITHIN * fast["seconds"]]
        nearest = max((row["psnr"] for row in equal), default=0.0)  # of none that is as fast
        for what, value, least in (
            (f"{control}: speed of fast beside half", fast["speed"], 2.5),
            (f"{control}: PSNR of fast beside half with fewer steps in no more time", fast["psnr"] - nearest, 0.0),
            (f"{control}: change of edge F1, lower end of its interval", fast["change of F1"][1], -0.02),
        ):
            found.append({"what": what, "value": round(value, 4), "least": least, "passed": value >= least})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = [row for name in CONTROLS for row in measure(name, variants())]
    print(table(measured))
    print(json.dumps({"rows": measured, "bounds": bounds(measured)}))
