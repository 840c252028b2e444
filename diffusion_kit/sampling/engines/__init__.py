"""What executes a step: see `engine`."""

from .compiled import Compiled
from .engine import Engine, Network, StepFunction, eager
from .openvino import OpenVINO

__all__ = ["Compiled", "Engine", "Network", "OpenVINO", "StepFunction", "eager"]
