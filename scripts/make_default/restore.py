"""Lays what is finished where the trainings that follow look for it, so that a lost `runs/` loses nothing.

`python scripts/make_default/restore.py` writes the parts of the embedded model, and the copies under `safety/`, into
`runs/make_default/`. `restore.py keep kandinsky/movq ...` makes such a copy of a training's result, in fp16.
"""

from __future__ import annotations

import shutil
import sys

from assemble import LEFT_OUT, halved, tidied
from new_base import ROOT, WORK

from diffusion_kit.models.sources import embedded

SAFETY = ROOT / "scripts/make_default/safety"


def main() -> None:
    controls = (embedded() / "controls").iterdir()
    parts = {"wide": embedded(), "autoencoder": embedded() / "vae"} | {part.name: part for part in controls}
    parts |= {copy.relative_to(SAFETY).as_posix(): copy for copy in SAFETY.glob("kandinsky/*")}
    for name, part in parts.items():
        shutil.copytree(part, WORK / name / "result", dirs_exist_ok=True, ignore=shutil.ignore_patterns("controls"))


def keep(name: str) -> None:
    shutil.rmtree(SAFETY / name, ignore_errors=True)
    shutil.copytree(WORK / name / "result", SAFETY / name, ignore=LEFT_OUT)
    halved(SAFETY / name)
    tidied(SAFETY / name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        for training in sys.argv[2:]:
            keep(training)
    else:
        main()
