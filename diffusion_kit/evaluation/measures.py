"""Which measures belong to which detector, and what they look at.

The set is that of ControlNet++ (Li et al., 2024, arXiv:2404.07987, section 4.1), and F1, PCK and CIEDE2000 for what it
has not.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffusion_kit.adapters.pictures import eight_bit, picture_tensor

from .depth import depth_mse, depth_rmse
from .edges import STRONG, edge_f1, ods_f1, soft_counts
from .intervals import mean
from .palette import colour_difference
from .pose import pck
from .regions import region_iou
from .structure import ssim


@dataclass(frozen=True)
class Measure:
    """A figure of many comparisons.

    Attributes:
        compare: of what was made and what was wanted: one number, or an array of a fixed shape.
        figure: of all comparisons (conditions, seeds, ...).
        of_sets: it compares two sets of pictures: it needs two conditions or more, and has no interval.
        reason: why it cannot be measured, in one line; None where it can.
        needs_photo: whether it compares with the photo that a condition was made from.
    """

    name: str
    larger_is_better: bool
    compare: Callable[[Any, Any], float | np.ndarray]
    figure: Callable[[np.ndarray], float] = mean
    of_sets: bool = False
    reason: str | None = None
    needs_photo: bool = False


def grey(picture: Image.Image) -> np.ndarray:
    """(H, W) in [0, 1]; of 16 bits all 16 count."""
    return picture_tensor(picture, picture.height, picture.width, channels=1)[0, 0].double().numpy()


def lines(picture: Image.Image) -> np.ndarray:
    """(H, W), true where it is white."""
    return grey(picture) >= STRONG


def colours(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) bytes."""
    return np.asarray(eight_bit(picture))


def of(see: Callable[[Image.Image], np.ndarray], compare: Callable[[np.ndarray, np.ndarray], Any]) -> Any:
    """A comparison of two pictures, by what is seen in them."""
    return lambda made, wanted: compare(see(made), see(wanted))


EDGES = (Measure("edge F1", True, of(lines, edge_f1)),)
LINES = (Measure("SSIM", True, of(grey, ssim)),)
SOFT = (*LINES, Measure("edge F1 (ODS)", True, of(grey, soft_counts), ods_f1))
DEPTH = (Measure("RMSE", False, of(grey, depth_rmse)), Measure("MSE", False, of(grey, depth_mse)))
POSE = (Measure("PCK", True, of(colours, pck)),)
MEASURES = {
    "canny": EDGES,
    "mlsd": EDGES,
    "sketch": EDGES,
    "hed": SOFT,
    "pidinet": SOFT,
    "lineart": LINES,
    "lineart_anime": LINES,
    "depth": DEPTH,
    "openpose": POSE,
    "pose": POSE,
    "regions": (Measure("mean IoU", True, of(colours, region_iou)),),
    "palette": (Measure("CIEDE2000", False, of(colours, colour_difference)),),
}


def measures_of(detector: str) -> tuple[Measure, ...]:
    """
    Raises:
        ValueError: none are known for it; names the detectors that have some.
    """
    if detector not in MEASURES:
        near = difflib.get_close_matches(detector, MEASURES, 1, 0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no measure for detector {detector!r}; {hint}there are some for {', '.join(MEASURES)}")
    return MEASURES[detector]
