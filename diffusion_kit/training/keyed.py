"""Randomness that is a function of place: every draw belongs to (seed, epoch, position in the epoch) and to its purpose.

So a run that was interrupted draws what it would have drawn, and how many processes or workers share it does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PURPOSES = (
    *("crop", "flip", "caption", "drop_caption", "drop_condition"),
    *("posterior", "noise", "offset", "timestep", "quantised"),
)


class Place(NamedTuple):
    """Where in a run a sample stands: `position` counts through the epoch, over all processes."""

    seed: int
    epoch: int
    position: int


def draws(place: Place, purpose: str) -> np.random.Generator:
    """A generator of its own for one purpose at one place."""
    return np.random.default_rng([*place, PURPOSES.index(purpose)])
