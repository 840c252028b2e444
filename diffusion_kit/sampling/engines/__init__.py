"""What executes a step: see `engine`."""

from .compiled import Compiled
from .engine import Engine, StepFunction, eager

__all__ = ["Compiled", "Engine", "StepFunction", "eager"]
