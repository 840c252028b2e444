"""What can be trained. A target is one module here with `make(config, device) -> Target`, named as in the configuration."""

from __future__ import annotations

import importlib

import torch

from diffusion_kit.training.config import Config

from .target import Target


def make_target(config: Config, device: torch.device) -> Target:
    """The target of a configuration, with its weights.

    Raises:
        FileNotFoundError, ValueError: no such base or weights, or what does not fit together, in one line.
    """
    return importlib.import_module(f"{__name__}.{config.target}").make(config, device)
