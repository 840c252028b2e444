"""What executes a step: see `engine`."""

from .compiled import Compiled
from .cudagraph import CudaGraphs
from .engine import Engine, Network, StepFunction, eager
from .openvino import OpenVINO
from .remembered import Answers, Remembered

__all__ = ["Answers", "Compiled", "CudaGraphs", "Engine", "Network", "OpenVINO", "Remembered", "StepFunction", "eager"]
