"""Notebooks: a training in the notebook's own process, and in two that accelerate starts from it."""

from __future__ import annotations

import sys
from typing import Any

from . import runs
from .runs import must_be_near, need, new, trained

CELLS = """\
from diffusion_kit.training.config import read
from diffusion_kit.training.train import train

config = read({file!r})
"""
ONE = "train(config)\n"
TWO = """\
from accelerate import notebook_launcher

notebook_launcher(train, (config,), num_processes=2)
"""


def notebook() -> dict[str, Any]:
    """Each in a fresh process, as a notebook's kernel is; both learn what two processes of torch's launcher learn."""
    figures: dict[str, Any] = {}
    for count, call in ((1, ONE), (2, TWO)):
        out = new(f"notebook-{count}")
        cells = CELLS.format(file=str(out.with_suffix(".yaml"))) + call
        runs.ended(out, runs.started(out, [sys.executable, "-c", cells], {}))
        need(runs.processes(out) == count, f"{count} processes were asked for, and {runs.processes(out)} trained")
        figures[f"{count} in a notebook"] = must_be_near(trained("two", 2), out)
    return figures
