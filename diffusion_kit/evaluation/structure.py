"""Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004), by scikit-image."""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity


def ssim(made: np.ndarray, wanted: np.ndarray) -> float:
    """Of two grey maps (H, W) in [0, 1], 11 pixels or more a side, in the paper's Gaussian windows; 1 where equal."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return float(structural_similarity(made, wanted, **options))
