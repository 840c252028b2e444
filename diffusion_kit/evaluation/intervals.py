"""Percentile bootstrap (Efron, 1979): how far a figure would move with other conditions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
ENDS = 0.025, 0.975


def mean(rows: np.ndarray) -> float:
    return float(rows.mean())


def bootstrap(
    rows: np.ndarray,
    figure: Callable[[np.ndarray], float] = mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Ends of the 95 % interval of a figure of rows (conditions, seeds, ...).

    Whole conditions are drawn, with all their seeds: pictures of one condition are not independent of each other.
    """
    random = np.random.default_rng(seed)
    picks = random.integers(len(rows), size=(resamples, len(rows)))
    figures = [figure(rows[pick]) for pick in picks]
    low, high = np.quantile(figures, ENDS)
    return float(low), float(high)
