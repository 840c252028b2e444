"""One denoising step as one function of tensors: denoiser, controls, guidance and the sampler's arithmetic.

Nothing in it reads a device tensor on the host, makes a tensor from Python numbers or changes a shape: it compiles into
one graph, and the graph can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .doors import Answer, Denoiser, Injection, LatentRule, Prediction, Tree, add_answers, at, in_every, pick
from .guidance import guide
from .transition import advance, noise_factor


@dataclass(frozen=True)
class Step:
    """What is fixed in a step; two equal steps are one graph.

    Attributes:
        branches: of guidance, along the batch; more than one are combined.
        offset: to the one branch is added what guidance is expected to add (see `cache`).
        rescaled: guidance rescale is applied.
        scaled: the network's input is scaled (samplers that work on sigmas).
        noise: the sampler draws noise in this schedule.
        clip_range, variance: see `transition.Transition`.
        linear: the sampler is a matrix; otherwise the step ends with the prediction.
        learned: the sampler takes the network's variance; where it is not linear, beside the prediction.
    """

    denoiser: Denoiser
    injections: tuple[Injection, ...]
    rule: LatentRule | None
    branches: int
    offset: bool
    rescaled: bool
    scaled: bool
    dtype: torch.dtype
    noise: bool
    clip_range: float | None
    variance: str | None
    linear: bool
    learned: bool

    @property
    def executed(self) -> tuple[Any, ...]:
        """The networks that run in it."""
        parts: tuple[Any, ...] = (self.denoiser, *self.injections)
        return tuple(net for part in parts for net in part.executed)

    @property
    def own_forward(self) -> bool:
        """Whether a network runs through its own forward: it is not among the executed ones."""
        return any(getattr(part, "own_forward", False) for part in (self.denoiser, *self.injections))

    def __call__(self, state: Tensor, call: Tensor, tensors: Tree) -> tuple[Tensor, Tensor, *tuple[Tree, ...]]:
        """Args:
            state: (R, B, C, H, W); the latents are row 0.
            call: (1,) index of the call, on the device.
            tensors: the tree that `loop.Run` builds.

        Returns:
            The next state and the prediction (B, C', H, W), guided; behind them what a step cache is to keep. Without a
            linear sampler the state is unchanged.
        """
        latents = state[0]
        prediction, variance, *features = self.predict(latents, call, tensors)
        if not self.linear:
            both = torch.cat([prediction, variance], 1) if self.learned and variance is not None else prediction
            return state, both, *features
        noise = pick(tensors["noise"], call)[0] if self.noise else None
        if noise is not None and self.variance and variance is not None:
            noise = noise * noise_factor(variance, self.variance, pick(tensors["log_spread"], call)[0])
        clean = None
        if self.clip_range is not None:
            p, q = pick(tensors["clean"], call)[0].unbind(-1)
            clean = (p * latents + q * prediction, self.clip_range)
        matrix = pick(tensors["matrix"], call)[0]
        state = advance(state, prediction, matrix, clean=clean, noise=noise)
        if self.rule is not None:
            kept = self.rule(tensors["rule"], state[0], call)
            state = torch.cat([kept[None], state[1:]])
        return state, prediction, *features

    def predict(self, latents: Tensor, call: Tensor, tensors: Tree) -> Prediction:
        """Guided prediction (B, C, H, W); the conditional branch's variance, if learned; what a cache is to keep."""
        x = latents * pick(tensors["input_scale"], call) if self.scaled else latents
        x = in_every(x.to(self.dtype), self.branches)
        answers = [
            injection(at(own, call), x, self.branches)
            for injection, own in zip(self.injections, tensors["controls"], strict=True)
        ]
        answer = reduce(add_answers, answers, Answer())
        if tensors["channels"] is not None:
            x = torch.cat([x, tensors["channels"]], 1)
        prediction, variance, *features = self.denoiser(at(tensors["denoiser"], call), x, answer)
        prediction = prediction.float()
        if self.branches > 1:
            conditional = prediction.chunk(self.branches)[-1]
            prediction = guide(prediction, tensors["guidance"], tensors["rescale"] if self.rescaled else None)
            variance = None if variance is None else variance.chunk(self.branches)[-1]
            features = [*features, prediction - conditional] if features else []
        elif self.offset:
            prediction = prediction + tensors["offset"]
        return prediction, variance, *features
