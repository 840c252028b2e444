"""What a denoising network is asked for: noise levels, noisy latents, targets and weights.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, with a_t the scheduler's product of alphas and SNR_t = a_t / (1 - a_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .config import ObjectiveConfig
from .keyed import Place, draws


@dataclass(frozen=True)
class Objective:
    """
    Attributes:
        alphas: (T,) a_t.
        prediction: "epsilon", "v_prediction", or of a prior "sample".
        zero_snr: whether the last timestep is pure noise.
    """

    alphas: Tensor
    prediction: str
    config: ObjectiveConfig
    zero_snr: bool = False

    def timesteps(self, places: Sequence[Place]) -> Tensor:
        """(B,) whole numbers below T."""
        T = len(self.alphas)
        fractions = [fraction(draws(place, "timestep"), self.config.timesteps) for place in places]
        return torch.tensor([min(int(f * T), T - 1) for f in fractions])

    def noise(self, places: Sequence[Place], shape: Sequence[int]) -> Tensor:
        """(B, *shape), each sample's own, with the offset that is constant in a channel."""
        noise = normal(places, "noise", shape)
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * normal(places, "offset", [shape[0], *(1,) * (len(shape) - 1)])
        return noise

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a = self._alpha(x, t)
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """e, v = sqrt(a) e - sqrt(1 - a) x_0 (Salimans and Ho 2022, arXiv 2202.00512), or x_0."""
        if self.prediction in ("epsilon", "sample"):
            return noise if self.prediction == "epsilon" else x
        a = self._alpha(x, t)
        return a.sqrt() * noise - (1 - a).sqrt() * x

    def weights(self, t: Tensor) -> Tensor:
        """(B,) min-SNR weights: min(SNR, g), over SNR for epsilon, over SNR + 1 for v; all 1 without g."""
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones(len(t), device=t.device)
        a = self.alphas.to(t.device)[t]
        # Multiplied by 1 - a, so that pure noise (a = 0) and clean latents divide by nothing.
        limited = torch.minimum(a, gamma * (1 - a))
        divisor = {"epsilon": a, "v_prediction": torch.ones_like(a), "sample": 1 - a}[self.prediction]
        return limited / divisor

    def _alpha(self, x: Tensor, t: Tensor) -> Tensor:
        return self.alphas.to(x)[t].view(-1, *(1,) * (x.ndim - 1))


def make_objective(scheduler: Any, config: ObjectiveConfig) -> Objective:
    """The objective of a base's scheduler, with what the configuration changes.

    Raises:
        ValueError: zero terminal SNR with a prediction of the noise, or a prediction that is neither.
    """
    own = scheduler.config
    prediction = config.prediction or own.get("prediction_type", "epsilon")
    zero = own.get("rescale_betas_zero_snr", False) if config.zero_terminal_snr is None else config.zero_terminal_snr
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the base predicts {prediction!r}; epsilon and v_prediction can be trained")
    if zero and prediction == "epsilon":
        raise ValueError(
            "objective.zero_terminal_snr: pure noise tells nothing of the noise that is predicted; "
            "set objective.prediction=v_prediction, or zero_terminal_snr=false"
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    trained = DDPMScheduler(**{name: own[name] for name in names if name in own}, rescale_betas_zero_snr=zero)
    return Objective(trained.alphas_cumprod.float(), prediction, config, zero)


def fraction(rng: np.random.Generator, kind: str) -> float:
    """Noise level in [0, 1): uniform; cubic 1 - u^3 (T2I-Adapter, arXiv 2302.08453, section 3.4); or logit-normal, which
    prefers the middle (Esser et al. 2024, arXiv 2403.03206)."""
    if kind == "logit_normal":
        return 1 / (1 + float(np.exp(-rng.standard_normal())))
    u = rng.random()
    return 1 - u**3 if kind == "cubic" else u


def normal(places: Sequence[Place], purpose: str, shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal, float32, each sample's own."""
    return torch.from_numpy(np.stack([draws(p, purpose).standard_normal(shape, np.float32) for p in places]))
