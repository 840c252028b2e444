"""What executes a step: see `engine`."""

from .aoti import AOTI
from .compiled import Compiled, Graphs
from .cudagraph import Captured, CudaGraphs
from .engine import Engine, Network, StepFunction, eager
from .openvino import OpenVINO
from .remembered import Answers, Remembered

__all__ = [
    "AOTI",
    "Answers",
    "Captured",
    "Compiled",
    "CudaGraphs",
    "Engine",
    "Graphs",
    "Network",
    "OpenVINO",
    "Remembered",
    "StepFunction",
    "eager",
]
