"""What can be trained. A target is one module here with `make(config, device) -> Target`, named as in the configuration."""

from __future__ import annotations

import importlib

import torch

from diffusion_kit.training.config import Config

from .target import Target

# What starts from `init_from`, and which of `network` may be said beside it.
CHANGEABLE: dict[str, set[str]] = {"t2i_adapter": {"gain"}, "controlnet": set(), "control_lora": {"rank"}}
WITHOUT_SETTINGS = ("prior", "hint_decoder")


def make_target(config: Config, device: torch.device) -> Target:
    """The target of a configuration, with its weights.

    Raises:
        FileNotFoundError, ValueError: no such base or weights, or what does not fit together, in one line.
    """
    if config.init_from and config.target not in CHANGEABLE:
        place = "base.prior" if config.target == "prior" else "base.model"
        raise ValueError(f"init_from is for {', '.join(CHANGEABLE)}; a {config.target} starts from {place}")
    if config.network and config.target in WITHOUT_SETTINGS:
        raise ValueError(
            f"network.{next(iter(config.network))}: a {config.target} is as its base is; leave network empty"
        )
    if config.init_from and (fixed := set(config.network) - CHANGEABLE[config.target]):
        raise ValueError(
            f"network.{min(fixed)}: a network that starts from init_from is as its weights are; leave it out"
        )
    return importlib.import_module(f"{__name__}.{config.target}").make(config, device)
