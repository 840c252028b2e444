"""Write the model folder from the newest checkpoints, as fp16 safetensors. `python export.py`

What has no checkpoint yet is left out: the adapter comes last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import adapter
import autoencoder
import base
import loop
import tokenizer
import torch
from data import MODEL, WORK
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

LARGEST = 28_000_000


def pipeline() -> StableDiffusionXLPipeline:
    """The pipeline over the averaged weights, in float16."""
    parts = loop.averaged("base", base.build()).half()
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(autoencoder.FOLDER, torch_dtype=torch.float16),
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=tokenizer.load(),
        tokenizer_2=tokenizer.load(),
        unet=parts["unet"],
        scheduler=EulerDiscreteScheduler(**base.SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def tidy(folder: Path) -> None:
    """Make the configurations load in float32, without paths, and check the sizes."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if path.name == "config.json":
            content.pop("_name_or_path", None)
            if "dtype" in content:  # transformers would load half precision beside a float UNet
                content["dtype"] = "float32"
            path.write_text(json.dumps(content, indent=2) + "\n")
    sizes = {p: p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    for path, size in sizes.items():
        path.chmod(0o644)
        print(f"{size:>12,} {path.relative_to(folder)}")
        assert size <= LARGEST, path
    print(f"{sum(sizes.values()):>12,} in all")


def main() -> None:
    new = WORK / "export"
    shutil.rmtree(new, ignore_errors=True)
    pipeline().save_pretrained(new, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(new / name)
        tokenizer.write(new / name)
    if (WORK / "adapter.pt").exists():
        canny = loop.averaged("adapter", adapter.build()).half()
        canny.save_pretrained(new / "controls" / "canny", safe_serialization=True)
    tidy(new)
    shutil.rmtree(MODEL, ignore_errors=True)
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(new, MODEL)


if __name__ == "__main__":
    main()
