"""Lays what is finished where the trainings that follow look for it, so that a lost `runs/` loses nothing.

`python scripts/make_default/restore.py` writes the parts of the embedded models into `runs/make_default/`.
"""

from __future__ import annotations

import shutil

import torch
from diffusers import KandinskyV22CombinedPipeline
from new_base import WORK

from diffusion_kit.models.sources import embedded


def main() -> None:
    controls = (embedded() / "controls").iterdir()
    parts = {"wide": embedded(), "autoencoder": embedded() / "vae"} | {part.name: part for part in controls}
    for name, part in parts.items():
        shutil.copytree(part, WORK / name / "result", dirs_exist_ok=True, ignore=shutil.ignore_patterns("controls"))
    both = KandinskyV22CombinedPipeline.from_pretrained(embedded("default-kandinsky"), torch_dtype=torch.float32)
    both.decoder_pipe.save_pretrained(WORK / "kandinsky/wide/result")
    both.prior_pipe.save_pretrained(WORK / "kandinsky/prior/result")


if __name__ == "__main__":
    main()
