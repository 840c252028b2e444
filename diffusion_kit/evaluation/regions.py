"""How well the areas of two pictures agree."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from skimage.color import rgb2lab

MOST = 256  # colours of a map of regions


def mean_iou(made: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of each label, the mean of those that either map (H, W) has."""
    labels = np.union1d(made, wanted)
    pairs = [(made == label, wanted == label) for label in labels]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def region_iou(made: np.ndarray, wanted: np.ndarray) -> float:
    """Mean IoU of two colour maps (H, W, 3) of bytes; a made colour is the region whose colour is nearest in CIE Lab.

    Raises:
        ValueError: too many wanted colours for regions, or one, which any picture has.
    """
    colours, labels = np.unique(wanted.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) < 2:
        raise ValueError("a map of regions has one colour: there is nothing to follow")
    if len(colours) > MOST:
        raise ValueError(
            f"a map of regions has {len(colours)} colours; at most {MOST} are regions: was it resized, or saved as JPEG?"
        )
    _, nearest = cKDTree(rgb2lab(colours)).query(rgb2lab(made.reshape(-1, 3)))
    return mean_iou(nearest, labels.ravel())
