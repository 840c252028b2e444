"""Lays the copies under `safety/` where the trainings that follow look for them, in float32.

`python scripts/make_default/restore.py` writes `runs/make_default/autoencoder/result/` and, where there is a copy of it,
`runs/make_default/base/result/`.
"""

from __future__ import annotations

import shutil

import new_base
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
    autoencoder, base = WORK / "autoencoder/result", WORK / "base/result"
    shutil.copytree(SAFETY / "autoencoder", autoencoder, dirs_exist_ok=True)
    if (SAFETY / "base").is_dir():
        new_base.main(autoencoder, base)
        pipe = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
        parts = {name: cls.from_pretrained(SAFETY / "base" / name).float() for name, cls in PARTS.items()}
        pipe.register_modules(**parts)
        pipe.save_pretrained(base, safe_serialization=True)


if __name__ == "__main__":
    main()
