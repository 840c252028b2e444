"""Puts what was trained into the model folders of the package, as fp16 safetensors.

`python scripts/make_default/assemble.py default` takes `runs/make_default/wide/result` and, where they are, the results of
the controls, and writes `diffusion_kit/models/default/`; `default_kandinsky` the same of `runs/make_default/kandinsky/`.
`--out FOLDER` writes somewhere else, to be measured first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    EulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusionXLPipeline,
)
from new_base import ROOT, SCHEDULE, TOKENIZER, WORK
from safetensors.torch import load_file, save_file

MODELS = ROOT / "diffusion_kit/models"
CONTROLS = ("canny", "sketch", "palette", "canny_controlnet", "regions")
LEFT_OUT = shutil.ignore_patterns("*.png", "*.md", "*.yaml")


def default(new: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(
        WORK / "wide/result", add_watermarker=False, torch_dtype=torch.float32
    )
    pipe.register_modules(scheduler=EulerDiscreteScheduler(**SCHEDULE))
    pipe.save_pretrained(new, safe_serialization=True)
    for name in CONTROLS:
        result = WORK / name / "result"
        if result.is_dir():
            shutil.copytree(result, new / "controls" / name, ignore=LEFT_OUT)


def default_kandinsky(new: Path) -> None:
    """Decoder and prior together; the decoder that takes a hint of edges is a control."""
    results = WORK / "kandinsky"
    decoder = KandinskyV22Pipeline.from_pretrained(results / "wide/result", torch_dtype=torch.float32)
    prior = KandinskyV22PriorPipeline.from_pretrained(results / "prior/result", torch_dtype=torch.float32)
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    KandinskyV22CombinedPipeline(**decoder.components, **parts).save_pretrained(new, safe_serialization=True)
    if (results / "hint/result").is_dir():
        shutil.copytree(results / "hint/result/unet", new / "controls/canny", ignore=LEFT_OUT)


# The sets, and how many bytes each may have.
SETS: dict[str, tuple[Callable[[Path], None], int]] = {
    "default": (default, 60_000_000),
    "default_kandinsky": (default_kandinsky, 30_000_000),
}
STEPS, GUIDANCE = 20, 2.5  # good for both
CARD = f"""---
library_name: diffusers
license: apache-2.0
num_inference_steps: {STEPS}
guidance_scale: {GUIDANCE}
---

"{{name}}" of diffusion_kit. What it can do, and how it was made, is in docs/embedded-model.md.
"""


def halved(folder: Path) -> None:
    """Every weight in float16."""
    for file in folder.rglob("*.safetensors"):
        save_file(
            {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()},
            file,
        )


def tidied(folder: Path) -> None:
    """Configurations load in float32 and name no folders of this machine."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and file.name in ("config.json", "model_index.json"):
            content.pop("_name_or_path", None)
            if "dtype" in content:  # transformers would load half precision beside a float UNet
                content["dtype"] = "float32"
            file.write_text(json.dumps(content, indent=2) + "\n")


def main(name: str, out: Path) -> None:
    make, largest = SETS[name]
    new = out.with_name(f".{out.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    make(new)
    for folder in new.glob("*tokenizer*"):
        shutil.rmtree(folder)
        shutil.copytree(TOKENIZER, folder)
    halved(new)
    tidied(new)
    (new / "README.md").write_text(CARD.format(name=name.replace("_", "-")))
    size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    for file in sorted(new.rglob("*.safetensors")):
        print(f"{file.stat().st_size:>12,} {file.relative_to(new)}")
    print(f"{size:>12,} in all")
    if size > largest:
        raise SystemExit(f"more than {largest:,} bytes")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--out", type=Path, help="folder; by default that of the package")
    options = parser.parse_args()
    main(options.set, options.out or MODELS / options.set)
