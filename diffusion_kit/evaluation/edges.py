"""How well two maps of edges agree: F1 of their pixels with a tolerance, after Martin, Fowlkes and Malik (2004).

A pixel counts as found where the other map has one within the tolerance; pixels are not matched one to one.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.morphology import skeletonize

SHARE = 0.0075  # of the diagonal: BSDS's tolerance
THRESHOLDS = np.arange(1, 20) / 20  # at which a soft map becomes edges
STRONG = 0.5  # what counts as an edge in the map that is wanted


def edge_f1(made: np.ndarray, wanted: np.ndarray, tolerance: float | None = None) -> float:
    """F1 of two boolean maps (H, W). Both empty is 1, one of them empty is 0.

    Args:
        tolerance: in pixels; by default max(1, 0.0075 x the diagonal).

    Raises:
        ValueError: maps of different shapes.
    """
    return float(f1_of(edge_counts(made, wanted, tolerance)))


def edge_counts(made: np.ndarray, wanted: np.ndarray, tolerance: float | None = None) -> np.ndarray:
    """(4,): made edge pixels that are right, all made ones, wanted ones that are found, all wanted ones."""
    if made.shape != wanted.shape:
        raise ValueError(f"edge maps of shapes {made.shape} and {wanted.shape}; they must be equal")
    reach = max(1.0, SHARE * math.hypot(*made.shape)) if tolerance is None else tolerance
    counts = []
    for own, other in ((made, wanted), (wanted, made)):
        near = distance_transform_edt(~other) <= reach if other.any() else np.zeros_like(own)
        counts += [(own & near).sum(), own.sum()]
    return np.array(counts)


def f1_of(counts: np.ndarray) -> np.ndarray:
    """(...) from counts (..., 4)."""
    right, made, found, wanted = np.moveaxis(counts, -1, 0)
    precision, recall = right / np.maximum(made, 1), found / np.maximum(wanted, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return np.where(made + wanted == 0, 1.0, f1)


def soft_counts(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(thresholds, 4) counts of soft maps (H, W) in [0, 1], thinned to lines of one pixel, for `ods_f1`.

    The made map is cut at every threshold, the wanted one at a half.
    """
    lines = skeletonize(wanted >= STRONG)
    return np.stack([edge_counts(skeletonize(made >= threshold), lines) for threshold in THRESHOLDS])


def ods_f1(counts: np.ndarray) -> float:
    """F1 of a whole set (..., thresholds, 4) at the one threshold that is best for the set (optimal data-set scale).

    Where no edge is wanted in the set it is the lowest one: at the highest nothing is made, whatever is there.
    """
    whole = counts.reshape(-1, *counts.shape[-2:]).sum(0)
    if not whole[0, 3]:
        return float(f1_of(whole[0]))
    return float(f1_of(whole).max())
