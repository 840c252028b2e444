"""Errors of depth maps up to scale and shift, which one picture does not tell (Ranftl et al., 2020, arXiv:1907.01341)."""

from __future__ import annotations

import numpy as np


def aligned(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """s made + t with the least squared error to `wanted`, both (H, W), s >= 0: near taken for far is not made good."""
    centred = made - made.mean()
    variance = (centred**2).mean()
    scale = max(0.0, (centred * wanted).mean() / variance) if variance > 1e-12 else 0.0
    return scale * centred + wanted.mean()


def depth_mse(made: np.ndarray, wanted: np.ndarray) -> float:
    """Mean squared error after alignment, in squares of the range of `wanted`'s greys, [0, 1]."""
    return float(((aligned(made, wanted) - wanted) ** 2).mean())


def depth_rmse(made: np.ndarray, wanted: np.ndarray) -> float:
    """Its root."""
    return depth_mse(made, wanted) ** 0.5
