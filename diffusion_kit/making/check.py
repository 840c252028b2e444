"""What can be wrong with what is asked for, found out before a model is loaded."""

from __future__ import annotations

import math

from diffusion_kit.adapters.control import Control
from diffusion_kit.adapters.detectors import detector
from diffusion_kit.adapters.pictures import FITS
from diffusion_kit.recipes import Recipe

from .job import AUTO, DTYPES, Job, Settings
from .loading import check_execution
from .pictures import numbers, opened

MOST_STEPS = 10_000


def check(job: Job, settings: Settings, seed: int) -> None:
    """What can be wrong before a model is loaded: pictures, windows and scales, names of detectors, fit, device."""
    if settings.steps is not None and not 1 <= settings.steps <= MOST_STEPS:
        raise ValueError(f"--steps is {settings.steps}; it must be 1 to {MOST_STEPS}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is {seed}; it must be 0 or more, and below 2^63 for every picture")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype is {settings.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if not math.isfinite(settings.guidance_scale or 0):
        raise ValueError(f"--guidance-scale is {settings.guidance_scale}; it must be a finite number")
    if settings.fit not in FITS:
        raise ValueError(f"--fit is {settings.fit!r}; it must be one of {', '.join(FITS)}")
    if settings.strength is not None and not 0 <= settings.strength <= 1:
        raise ValueError(f"--strength is {settings.strength}; it must be between 0 and 1")
    _check_job(job, settings.old)
    check_execution(settings)


def _check_job(job: Job, old: Recipe | None) -> None:
    for ref in job.files:
        opened(ref)
    for control in job.controls:
        if old is not None and control in old.controls and control.hash is None:
            raise ValueError(f"the recipe has no hash of its control {control.kind}: give --control to use it")
        Control(control.kind, None, **numbers(control))
        if control.detect not in (AUTO, None, "none"):
            detector(control.detect.partition(":")[0])
