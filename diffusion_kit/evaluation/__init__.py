"""How faithfully a control was followed, and how good the pictures are."""

from . import mse
from .measures import MEASURES, Measure
from .protocol import Condition, evaluate
from .quality import quality_measures
from .report import Report

__all__ = ["MEASURES", "Condition", "Measure", "Report", "evaluate", "mse", "quality_measures"]
