"""What executes a step: see `engine`."""

from .aoti import AOTI
from .compiled import Compiled
from .cudagraph import CudaGraphs
from .engine import Engine, Network, StepFunction, eager
from .openvino import OpenVINO
from .remembered import Answers, Remembered

__all__ = [
    "AOTI",
    "Answers",
    "Compiled",
    "CudaGraphs",
    "Engine",
    "Network",
    "OpenVINO",
    "Remembered",
    "StepFunction",
    "eager",
]
