"""Bytes that a device sends in a step, by the costs of a ring: of S bytes a gather, or a reduce-scatter, sends
(N - 1) / N S, an all-reduce twice that (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).

With Psi trained numbers the paper has 2 Psi for DDP and ZeRO 1 and 2, 3 Psi for ZeRO 3. Here a frozen base has no
gradients: it is gathered, forward and backward, and nothing else. DeepSpeed 0.19 averages gradients in stages 1 and 2 by an
all-reduce, which is 3 Psi, unless `use_multi_rank_bucket_allreduce` is false; in stages 2 and 3 it does so for every
micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .footprint import FULL, Sizes, Way


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends in a step, for gradients and for weights, and how often a ring goes round for them."""

    gradients: float
    weights: float
    rounds: float

    @property
    def bytes(self) -> float:
        return self.gradients + self.weights


def traffic(own: Sizes, way: Way) -> Traffic:
    """Of a step; none of one process."""
    part = (way.processes - 1) / way.processes
    if way.stage is None:
        return Traffic(
            2 * part * FULL * own.trained, 0, 2 * -(-FULL * own.trained // 25e6)
        )  # DDP's buckets are of 25 MB
    grads = part * own.half * own.trained
    reduced = way.count if way.stage >= 2 else 1
    buckets = -(-own.trained // way.setting("reduce_bucket_size"))
    if way.stage == 0:
        return Traffic(2 * grads, 0, 2 * buckets)
    if way.stage < 3:
        times = 2 if way.zero.get("use_multi_rank_bucket_allreduce", True) else 1
        return Traffic(times * reduced * grads, grads, times * reduced * buckets + 1)
    weights, numbers = gathers(own, way)
    rounds = way.count * (-(-numbers // way.setting("stage3_prefetch_bucket_size")) + buckets)
    return Traffic(reduced * grads, part * weights, rounds)


def gathers(own: Sizes, way: Way) -> tuple[float, float]:
    """Bytes of weights that are gathered in a step of stage 3, and numbers in a micro-batch.

    A weight is gathered forward, and again backward unless it stayed; small ones once, after the optimizer's step.
    """
    small, small_base = own.small(way.setting("stage3_param_persistence_threshold"))
    base = own.spread - small_base if way.spread else 0
    numbers = own.trained - small + base
    again = max(0.0, numbers - way.setting("stage3_max_reuse_distance") / 2)
    width = (own.half * (own.trained - small) + own.width * base) / max(1, numbers)
    kept = own.half * small + (own.width * small_base if way.spread else 0)
    return way.count * (numbers + again) * width + kept, numbers + again
