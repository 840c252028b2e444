"""Ways in which processes share a training: every one with all weights, or each with a part of them (ZeRO)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffusion_kit.training.bases import spread_in_engine
from diffusion_kit.training.config import Config
from diffusion_kit.training.optimizers import make_optimizer
from diffusion_kit.training.targets.target import Target

from .parallel import Parallel
from .replicated import Replicated


def make_parallel(
    config: Config, accelerator: Accelerator, target: Target, say: Callable[[str], None] = print
) -> Parallel:
    """
    Raises:
        ImportError, ValueError: DeepSpeed is asked for and not installed, or its configuration cannot be used.
    """
    if config.deepspeed is None:
        return Replicated(config.optimizer, accelerator, target)
    from .settings import settings, width_of
    from .zero import Zero, require

    require()
    frozen = spread(config, target)
    nets = [target, *target.children(), *frozen]
    own = settings(config, accelerator.num_processes, width_of(nets), say)
    if accelerator.is_main_process:
        file = Path(config.output) / "deepspeed.json"
        file.write_text(json.dumps(own, indent=2) + "\n")
        say(f"deepspeed: runs with {file}")
    weights = [weight for weight in target.parameters() if weight.requires_grad]
    optimizer = None if "optimizer" in own else make_optimizer(config.optimizer, weights)
    return Zero(own, optimizer, frozen, accelerator, target)


def spread(config: Config, target: Target) -> list[Any]:
    """Frozen networks that are spread over the processes with what is trained."""
    return [] if target.base is None or not spread_in_engine(config) else [target.base.unet]
