"""What executes a step: see `engine`."""

from .compiled import Compiled
from .cudagraph import CudaGraphs
from .engine import Engine, Network, StepFunction, eager
from .openvino import OpenVINO

__all__ = ["Compiled", "CudaGraphs", "Engine", "Network", "OpenVINO", "StepFunction", "eager"]
