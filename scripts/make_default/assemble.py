"""Puts what was trained into the model folder of the package, as fp16 safetensors.

`python scripts/make_default/assemble.py` takes `runs/make_default/base/result` and, where they are, the results of the
controls, and writes `diffusion_kit/models/default/`; `--out FOLDER` writes somewhere else, to be measured first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from new_base import ROOT, SCHEDULE, TOKENIZER, WORK
from safetensors.torch import load_file, save_file

MODEL = ROOT / "diffusion_kit/models/default"
CONTROLS = ("canny", "sketch", "palette", "canny_controlnet", "regions")
LARGEST = 60_000_000  # bytes of the whole


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
        if isinstance(content, dict) and file.name == "config.json":
            content.pop("_name_or_path", None)
            if "dtype" in content:  # transformers would load half precision beside a float UNet
                content["dtype"] = "float32"
            file.write_text(json.dumps(content, indent=2) + "\n")


def main(out: Path) -> None:
    new = out.with_name(f".{out.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        WORK / "base/result", add_watermarker=False, torch_dtype=torch.float32
    )
    pipe.register_modules(scheduler=EulerDiscreteScheduler(**SCHEDULE))
    pipe.save_pretrained(new, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(new / name)
        shutil.copytree(TOKENIZER, new / name)
    for name in CONTROLS:
        result = WORK / name / "result"
        if result.is_dir():
            shutil.copytree(result, new / "controls" / name, ignore=shutil.ignore_patterns("*.png", "*.md", "*.yaml"))
    halved(new), tidied(new)
    size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    for file in sorted(new.rglob("*.safetensors")):
        print(f"{file.stat().st_size:>12,} {file.relative_to(new)}")
    print(f"{size:>12,} in all")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST:,} bytes")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=MODEL)
    main(parser.parse_args().out)
