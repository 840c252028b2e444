"""Folders of small bases and data that trainings in tests read, made once a session."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import conftest
import kandinsky_models
from PIL import Image

from diffusion_kit.training.config import Config, parse

MOVQ = {  # a new one's configuration
    "class": "VQModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
}


@cache
def root() -> Path:
    return conftest.scratch()


@cache
def base(family: str = "sdxl") -> str:
    """Folder of a small pipeline."""
    import diffusers

    folder = root() / family
    if family == "sdxl":
        pipe = conftest.pipeline(diffusers.StableDiffusionXLPipeline)
    elif family == "sd15":
        pipe = conftest.sd_pipeline(diffusers.StableDiffusionPipeline)
    elif family == "prior":
        pipe = diffusers.KandinskyV22PriorPipeline(**kandinsky_models.prior_components())
    else:
        own = {"unet": kandinsky_models.unet22(), "movq": kandinsky_models.movq()}
        pipe = diffusers.KandinskyV22Pipeline(
            **own, scheduler=diffusers.DDPMScheduler(**kandinsky_models.DECODER_SCHEDULE)
        )
    pipe.save_pretrained(folder, safe_serialization=True)
    return str(folder)


@cache
def data(count: int = 6, size: int = 64) -> str:
    """Folder of pictures with two captions each."""
    folder = root() / f"data-{count}-{size}"
    folder.mkdir()
    rows = []
    for k in range(count):
        conftest.picture(k, size).save(folder / f"{k}.png")
        Image.effect_noise((size, size), 90).convert("RGB").save(folder / f"condition-{k}.png")
        rows.append(
            {"image": f"{k}.png", "conditioning_image": f"condition-{k}.png", "text": [f"a {k}", f"picture {k}"]}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def config(target: str, output: Path | str, family: str = "sdxl", **more: Any) -> Config:
    """A short training; `more` is put over it, dicts into dicts."""
    tree: dict[str, Any] = {
        "target": target,
        "output": str(output),
        "base": {"model": base(family)},
        "steps": 3,
        "batch": 2,
        "log_every": 1,
        "data": {"sources": [{"path": data()}], "resolution": 64, "workers": 0},
        "optimizer": {"learning_rate": 1e-3},
    }
    if family == "kandinsky":
        tree["base"]["prior"] = base("prior")
    for name, value in more.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return parse(tree, "test")
