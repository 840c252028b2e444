"""The autoencoder of a base, or a new one: pictures to latents and back; an AutoencoderKL, or Kandinsky's MoVQ (VQModel).

The loss is a weighted sum of absolute and squared errors, of errors of the gradients (edges), of 1 - SSIM (Wang et al.
2004), of the colours of small areas, and of the KL divergence of the latents from a normal distribution (Kingma and Welling
2014, arXiv 1312.6114), or of a MoVQ of how far they are from their codes (van den Oord et al. 2017, arXiv 1711.00937).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.models.attention_processor import SpatialNorm
from torch import Tensor

from diffusion_kit.models.sources import component_class, load_component, locate
from diffusion_kit.models.vae import encode_mode, scale_factor
from diffusion_kit.pipelines.auto import class_name
from diffusion_kit.training.bases import hub
from diffusion_kit.training.config import Config
from diffusion_kit.training.data.samples import Batch
from diffusion_kit.training.keyed import draws
from diffusion_kit.training.objective import normal

from .target import Losses, Target, built, checkpoint_gradients, in_float32

WEIGHTS = {
    "absolute": 1.0,
    "squared": 2.0,
    "gradients": 0.5,
    "structure": 0.2,
    "colours": 1.0,
    "kl": 1e-4,
    "codes": 1.0,
}
# Light, orange against blue, and green against magenta; the last, which is learned last, counts three times.
OPPONENTS = ((0.58, 0.58, 0.58), (1.0, 0.0, -1.0), (1.22, -2.45, 1.22))
CLASSES = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}  # of `network.class`
COMMITMENT = 0.25  # of latents to their codes, beside that of codes to their latents
AREA = 4  # pixels of a side of the areas whose colours are compared


class AutoencoderTarget(Target):
    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config)
        network = dict(config.network)
        self.weights = {name: float(network.pop(name, default)) for name, default in WEIGHTS.items()}
        name = network.pop("class", "AutoencoderKL")
        if name not in CLASSES:
            raise ValueError(f"network.class is {name!r}; it must be {' or '.join(CLASSES)}")
        self.vae = in_float32(built(CLASSES[name], network) if network else _existing(config)).to(device)

    @property
    def scale_factor(self) -> int:
        return scale_factor(self.vae)

    def forward(self, batch: Batch) -> Losses:
        pixels = torch.stack([sample.pixels for sample in batch.samples]).to(self.vae.device)
        made, more = self._quantised(pixels, batch) if isinstance(self.vae, VQModel) else self._drawn(pixels, batch)
        parts = compared(made.float(), pixels) | more
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum(0)
        return Losses(loss, torch.zeros_like(loss))

    def _drawn(self, pixels: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures of latents drawn from their distribution, and its divergence from a normal one, (B,)."""
        posterior = self.vae.encode(pixels).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        latents = mean + deviation * normal(batch.places, "posterior", mean.shape[1:]).to(mean)
        kl = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).mean((1, 2, 3))
        return self.vae.decode(latents).sample, {"kl": kl}

    def _quantised(self, pixels: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures of the latents as they are, which is what the pipelines decode, or of their codes, by a coin for each
        sample; and how far latents and codes are from each other, (B,)."""
        latents = self.vae.encode(pixels).latents
        straight, _, (_, _, indices) = self.vae.quantize(latents)
        coins = torch.tensor([draws(place, "quantised").random() < 0.5 for place in batch.places])
        decoded = torch.where(coins.to(latents.device)[:, None, None, None], straight, latents)
        batch_first = (len(latents), *latents.shape[2:], latents.shape[1])
        codes = self.vae.quantize.get_codebook_entry(indices, batch_first).float()
        latents = latents.float()
        apart = F.mse_loss(codes, latents.detach(), reduction="none")
        apart = apart + COMMITMENT * F.mse_loss(latents, codes.detach(), reduction="none")
        return self.vae.decode(decoded, force_not_quantize=True).sample, {"codes": apart.mean((1, 2, 3))}

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] from the means of their latents."""
        latents = encode_mode(self.vae, pixels.to(self.vae.device))
        return self.vae.decode(
            latents, **({"force_not_quantize": True} if isinstance(self.vae, VQModel) else {})
        ).sample

    def save(self, folder: Path) -> None:
        self.vae.save_pretrained(folder, safe_serialization=True)

    def checkpoint_gradients(self) -> None:
        checkpoint_gradients(self.vae)

    @torch.no_grad()
    def begin(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Puts the codes of a new MoVQ among its latents: codes that begin elsewhere are hardly ever the nearest, and stay
        unused (Zeghidour et al. 2021, arXiv 2107.03312)."""
        if not isinstance(self.vae, VQModel):
            return
        codes = self.vae.quantize.embedding.weight
        if codes.abs().max() <= 1 / len(codes):  # as they are drawn
            latents = self._latents(batches())
            codes.copy_(latents[:, torch.linspace(0, latents.shape[1] - 1, len(codes)).long()].T)

    @torch.no_grad()
    def finish(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Measures the latents' channels, so that the UNet sees them with mean 0 and deviation 1: by the configuration, or
        by the weights of a MoVQ, which has no place for it there."""
        vae = self.vae
        if not isinstance(vae, VQModel):
            vae.register_to_config(scaling_factor=1.0, latents_mean=None, latents_std=None)
        std, mean = torch.std_mean(self._latents(batches()), 1)
        if isinstance(vae, VQModel):
            fold(vae, mean, std)
        else:
            vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def _latents(self, batches: Iterable[Batch]) -> Tensor:
        """(C, N), of every area of the pictures that can be used."""
        rows = []
        for batch in batches:
            if used := [sample.pixels for sample in batch.samples if sample.weight and sample.pixels is not None]:
                latents = encode_mode(self.vae, torch.stack(used).to(self.vae.device))
                rows.append(latents.float().transpose(0, 1).flatten(1))
        return torch.cat(rows, 1)


def make(config: Config, device: torch.device) -> Any:
    return AutoencoderTarget(config, device)


def _existing(config: Config) -> Any:
    """The one that is named, or the base's."""
    if config.base.vae is not None:
        return load_component(CLASSES[component_class(config.base.vae)], config.base.vae)
    kind, name = (VQModel, "movq") if "Kandinsky" in class_name(config.base.model) else (AutoencoderKL, "vae")
    return load_component(kind, locate(config.base.model), subfolder=name, **hub(config))


def fold(movq: VQModel, mean: Tensor, std: Tensor) -> None:
    """Makes the latents (z - mean) / std, (C,) each, in every layer that writes or reads them; pictures stay the same.
    Weights keep their number type."""
    into, codes = movq.quant_conv, movq.quantize.embedding
    changed = [
        (into.weight, into.weight / std[:, None, None, None]),
        (into.bias, (into.bias - mean) / std),
        (codes.weight, (codes.weight - mean) / std),
    ]
    norms = [module for module in movq.decoder.modules() if isinstance(module, SpatialNorm)]
    for conv in (movq.post_quant_conv, *(own for norm in norms for own in (norm.conv_y, norm.conv_b))):
        changed.append((conv.bias, conv.bias + conv.weight[:, :, 0, 0].float() @ mean))
        changed.append((conv.weight, conv.weight * std[None, :, None, None]))
    for weight, value in changed:
        weight.data = value.to(weight.dtype)


def compared(made: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Differences of pictures (B, 3, H, W) in [-1, 1], each (B,)."""
    error = made - wanted
    axes = error.new_tensor(OPPONENTS)[None, :, :, None, None]
    flat = F.avg_pool2d((axes * error[:, None]).sum(2), AREA)
    return {
        "absolute": error.abs().mean((1, 2, 3)),
        "squared": error.square().mean((1, 2, 3)),
        "gradients": error.diff(dim=2).abs().mean((1, 2, 3)) + error.diff(dim=3).abs().mean((1, 2, 3)),
        "structure": 1 - similarity(made, wanted),
        "colours": flat.square().mean((1, 2, 3)),
    }


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM over boxes of 7 x 7, every second one, of pictures in [-1, 1]; (B,)."""

    def box(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=2)

    mean_a, mean_b = box(a), box(b)
    var_a, var_b = box(a * a) - mean_a**2, box(b * b) - mean_b**2
    covariance = box(a * b) - mean_a * mean_b
    c1, c2 = 0.02**2, 0.06**2  # (0.01 x range)^2 and (0.03 x range)^2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.mean((1, 2, 3))
