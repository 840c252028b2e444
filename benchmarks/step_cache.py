"""What the step cache saves and costs on the embedded model, beside full runs in the same process on one thread.

python benchmarks/step_cache.py [--json]

Seconds are processor time of a call without decoding, the least of three runs, summed over the prompts; errors are means
over the prompts. The base's own "canny" is a T2I-Adapter, whose features do not change from step to step. "+ ControlNet" is
beside it a copy of the UNet's encoder with random output convolutions: it shows what a ControlNet costs, and how far its
reused residuals are from its own, but follows no picture.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusion_kit import AutoPipelineForText2Image, Control, ControlNetModel

PROMPTS = ["a red apple on a blue background", "a purple balloon", "a drawing of a cat on yellow", "a house, 3d style"]
STEPS, RUNS, GAIN = 20, 3, 0.05
VARIANTS = [{"every": every, "controls": controls} for every in (2, 3, 5) for controls in ("reuse", "recompute")]


def edges() -> Image.Image:
    """A white ring on black."""
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((14, 14, 50, 50), outline="white")
    return picture


def controlnet(unet: Any) -> ControlNetModel:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32)).eval()
    generator = torch.Generator().manual_seed(0)
    for conv in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        conv.weight.data = GAIN * torch.randn(conv.weight.shape, generator=generator)
    return net


def sampled(pipe: Any, prompt: str, controls: list[Control], cache: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Least seconds of processor time, and the latents."""
    pipe.cache_steps(**cache)
    seconds = math.inf
    for _ in range(RUNS):
        generator, start = torch.Generator().manual_seed(0), time.process_time()
        latents = pipe(
            prompt, controls=controls, num_inference_steps=STEPS, generator=generator, output_type="latent"
        ).images
        seconds = min(seconds, time.process_time() - start)
    return seconds, latents


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of pictures in [0, 1], in dB."""
    return float(-10 * torch.log10((a - b).square().mean()))


def measure() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    pipe = AutoPipelineForText2Image.from_pretrained("default")
    pipe.set_progress_bar_config(disable=True)
    canny = Control("canny", edges())
    sets = {"canny": [canny], "canny + ControlNet": [canny, Control(controlnet(pipe.unet), edges())]}
    rows = []
    for name, controls in sets.items():
        full = [sampled(pipe, prompt, controls, {"every": None}) for prompt in PROMPTS]
        pictures = [pipe.decode(latents, "pt") for _, latents in full]
        for variant in VARIANTS:
            own = [sampled(pipe, prompt, controls, variant) for prompt in PROMPTS]
            errors = [float((a - b).norm() / b.norm()) for (_, a), (_, b) in zip(own, full, strict=True)]
            decibels = [psnr(pipe.decode(x, "pt"), full) for (_, x), full in zip(own, pictures, strict=True)]
            rows.append(
                {
                    "controls": name,
                    "every": variant["every"],
                    "in other steps": variant["controls"],
                    "speed": round(sum(s for s, _ in full) / sum(s for s, _ in own), 2),
                    "latent error": round(float(np.mean(errors)), 4),
                    "psnr": round(float(np.mean(decibels)), 1),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


if __name__ == "__main__":
    measured = measure()
    print(json.dumps(measured) if "--json" in sys.argv else table(measured))
