"""Kandinsky's prior (arXiv 2310.03502): learns to say which image embedding belongs to a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_kit.models.prior import PriorDenoiser, obstacle
from diffusion_kit.models.text import Layer, encode_text
from diffusion_kit.sampling.doors import Answer, at_once
from diffusion_kit.training.bases import as_given, embedded, load_prior
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch
from diffusion_kit.training.objective import Objective

from .target import Losses, Target, checkpoint_gradients, in_float32


class PriorTarget(Target):
    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        if config.objective.prediction is not None or config.objective.zero_terminal_snr is not None:
            raise ValueError("objective.prediction and zero_terminal_snr are not a prior's: it predicts the embedding")
        if config.objective.noise_offset:
            raise ValueError("objective.noise_offset is not a prior's: an embedding has no channels of a picture")
        self.pipe = load_prior(config, device)
        if (why := obstacle(self.pipe.prior)) is not None:
            raise ValueError(f"base.prior {config.base.prior} cannot be trained: {why}")
        self.prior = in_float32(self.pipe.prior)
        self.prior.clip_mean.requires_grad_(False)  # measured, not learned
        self.prior.clip_std.requires_grad_(False)
        alphas = self.pipe.scheduler.alphas_cumprod.float()
        self.objective = Objective(alphas, self.pipe.scheduler.config.prediction_type, config.objective)

    @property
    def executed(self) -> list[Any]:
        return [self.prior]

    def forward(self, batch: Batch) -> Losses:
        objective = self.objective
        x = (self.embeds(batch) - self.prior.clip_mean) / self.prior.clip_std  # (B, D), as the prior sees them
        noise = objective.noise(batch.places, x.shape[1:]).to(x)
        t = objective.timesteps(batch.places).to(x.device)
        denoiser = PriorDenoiser(self.prior)
        tensors = at_once(denoiser.prepare(t[None], self.conditioning(batch)))
        noisy = objective.add_noise(x, noise, t)[:, :, None, None]
        prediction = denoiser(tensors, noisy, Answer())[0][:, :, 0, 0]
        error = F.mse_loss(prediction.float(), objective.target(x, noise, t), reduction="none").mean(1)
        return Losses(error * objective.weights(t), t / len(objective.alphas))

    def embeds(self, batch: Batch) -> Tensor:
        return embedded(self.pipe, batch.samples, self.prior.device)

    def conditioning(self, batch: Batch) -> dict[str, Tensor]:
        captions = [sample.caption for sample in batch.samples]
        text = encode_text(captions, self.pipe.tokenizer, self.pipe.text_encoder, Layer(0, normed=True))
        tokens = self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {
            "prompt_embeds": text.pooled,
            "text_encoder_hidden_states": text.states,
            "text_mask": tokens.attention_mask.bool().to(text.states.device),
        }

    @torch.no_grad()
    def begin(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Measures mean and deviation of image embeddings, which the prior keeps with its weights, where it is new."""
        if self.prior.clip_mean.any():
            return
        used = ([sample for sample in batch.samples if sample.weight] for batch in batches())
        rows = torch.cat([embedded(self.pipe, own, self.prior.device) for own in used if own])
        std, mean = torch.std_mean(rows, 0)
        self.prior.clip_mean.data = mean[None]
        self.prior.clip_std.data = std[None].clamp(min=1e-4)

    def save(self, folder: Path) -> None:
        own = as_given(self.pipe, str(self.config.base.prior), self.config)
        own.save_pretrained(folder, safe_serialization=True)

    def checkpoint_gradients(self) -> None:
        checkpoint_gradients(self.prior)


def make(config: Config, device: torch.device) -> Any:
    return PriorTarget(config, device)
