"""Lays the copies under `safety/` where what follows looks for them, the base in float32.

`python scripts/make_default/restore.py` writes `runs/make_default/autoencoder/result/` and, of what else there is a copy,
`runs/make_default/wide/result/` and those of the controls. `restore.py keep NAME ...` makes the copies of controls.
"""

from __future__ import annotations

import shutil
import sys

import new_base
from assemble import CONTROLS, LEFT_OUT, halved
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from new_base import WORK
from transformers import CLIPTextModel, CLIPTextModelWithProjection

SAFETY = new_base.ROOT / "scripts/make_default/safety"
PARTS = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def main() -> None:
    autoencoder, base = WORK / "autoencoder/result", WORK / "wide/result"
    shutil.copytree(SAFETY / "autoencoder", autoencoder, dirs_exist_ok=True)
    if (SAFETY / "base").is_dir():
        new_base.main(autoencoder, base)
        pipe = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
        parts = {name: cls.from_pretrained(SAFETY / "base" / name).float() for name, cls in PARTS.items()}
        pipe.register_modules(**parts)
        pipe.save_pretrained(base, safe_serialization=True)
    for name in CONTROLS:
        if (SAFETY / name).is_dir():
            shutil.copytree(SAFETY / name, WORK / name / "result", dirs_exist_ok=True)


def keep(name: str) -> None:
    """Copies the result of a control's training, in fp16."""
    shutil.rmtree(SAFETY / name, ignore_errors=True)
    shutil.copytree(WORK / name / "result", SAFETY / name, ignore=LEFT_OUT)
    halved(SAFETY / name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        for control in sys.argv[2:]:
            keep(control)
    else:
        main()
