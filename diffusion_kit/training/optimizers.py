"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """
    Raises:
        ImportError: an optimizer that is not installed; says how to get it.
    """
    common: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.epsilon,
    }
    parameters = list(parameters)
    if config.name == "adamw8bit":
        return _installed("bitsandbytes", "bitsandbytes", "optim").AdamW8bit(parameters, **common)
    if config.name == "schedule_free":
        cls = _installed("schedulefree", "schedulefree").AdamWScheduleFree
        return cls(parameters, warmup_steps=config.warmup_steps, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def _installed(module: str, package: str, part: str | None = None) -> Any:
    import importlib

    try:
        return importlib.import_module(f"{module}.{part}" if part else module)
    except ImportError:
        raise ImportError(
            f"this optimizer needs {package}: pip install {package}, or set optimizer.name=adamw"
        ) from None


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of a step counted from 0: a linear warm-up, then constant, or down to 0 at the last step."""
    if config.name == "schedule_free":
        return config.learning_rate
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = max(0.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.learning_rate * warm * shape
