"""What every launcher starts: one training, in each of its processes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from diffusion_kit.training.config import Config

from . import machine
from .config import LaunchConfig

FORWARDED = ("CCL_WORKER_COUNT", "HF_HOME", "HF_HUB_OFFLINE", "LD_PRELOAD", "PYTHONPATH", "DS_ACCELERATOR")


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        config: of the training, from `file` with `overrides`.
        resume: whether it goes on.
    """

    config: Config
    file: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False

    @property
    def launch(self) -> LaunchConfig:
        return self.config.launch

    def train(self) -> tuple[str, ...]:
        return ("train", str(self.file), *self.overrides, *(["--resume"] if self.resume else []))

    def module(self) -> tuple[str, ...]:
        """For launchers that are given a module."""
        return ("-m", "diffusion_kit.cli", *self.train())

    def python(self) -> tuple[str, ...]:
        """For launchers that start any program."""
        return (sys.executable, *self.module())

    def environment(self, count: int) -> dict[str, str]:
        """Of each process: how many there are to be, which it checks, and how many threads are its own."""
        launch = self.launch
        found = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        found["DIFFUSION_KIT_PROCESSES"] = str(count * launch.machines)
        found["OMP_NUM_THREADS"] = str(self.config.threads or machine.threads(count))
        if launch.backend == "ccl":
            found.setdefault("CCL_WORKER_COUNT", "1")
        return found | dict(launch.environment)
