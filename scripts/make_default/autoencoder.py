"""Train the autoencoder: 64x64x3 pictures to 16x16x4 latents. `python autoencoder.py`"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import data
import loop
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

FOLDER = loop.WORK / "vae"


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,  # 32 leave one channel a group: the norm takes the colours out
        latent_channels=4,
        sample_size=data.SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def normalise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold the latents' mean and spread into the 1x1 convolutions: mean 0, std 1 after it."""
    with torch.no_grad():
        means = vae.encode(pictures).latent_dist.mode()
        mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))  # (4,)
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        weight[:4] /= std[:, None, None, None]
        bias[:4] = (bias[:4] - mean) / std
        bias[4:] -= 2 * std.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(b, 64, 64, 3) uint8 to (b, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def batches(plan: loop.Plan) -> Iterator[Tensor]:
    icons = data.load()
    pool = sorted(set(range(len(icons.slugs))) - set(data.held_out(icons)))
    rng = np.random.default_rng()
    while True:
        plain = [data.compose(icons, int(i), rng).picture for i in rng.choice(pool, plan.batch)]
        for k in range(plan.batch // 4):
            plain[k] = data.scene(icons, pool, rng)
        yield to_tensor(np.stack(plain))


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM over 7x7 boxes of (b, 3, h, w) in [-1, 1]."""

    def box(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=2)

    ma, mb = box(a), box(b)
    va, vb, ab = box(a * a) - ma * ma, box(b * b) - mb * mb, box(a * b) - ma * mb
    c1, c2 = 0.02**2, 0.06**2
    return ((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def opponents(x: Tensor) -> Tensor:
    """Red, green, blue to light, orange-blue and (times 3: it is learned last) green-magenta."""
    rows = [[0.58, 0.58, 0.58], [1.0, 0.0, -1.0], [1.22, -2.45, 1.22]]
    return torch.einsum("oc,bchw->bohw", torch.tensor(rows), x)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def loss(vae: nn.Module, pictures: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        made = vae.decode(posterior.sample()).sample
    made = made.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edges = sum(
        (F.l1_loss(a, b) for a, b in zip(gradients(made), gradients(pictures), strict=True)),
        start=torch.zeros(()),
    )
    error = made - pictures
    value = error.abs().mean() + 2 * (error**2).mean() + 0.5 * edges
    flat = F.avg_pool2d(opponents(error), 4).pow(2).mean()
    return value + flat + 0.2 * (1 - similarity(made, pictures)) + 1e-4 * kl


def decibels(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR of decoded posterior means, each picture for itself."""
    with torch.no_grad():
        made = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return (-10 * torch.log10(((made - pictures) / 2).pow(2).mean((1, 2, 3)) + 1e-10)).mean().item()


def held_out_pictures(count: int = 128) -> Tensor:
    """Pictures of drawings that no training saw, always the same ones."""
    icons, rng = data.load(), np.random.default_rng(1)
    chosen = data.held_out(icons)[:count]
    return to_tensor(np.stack([data.compose(icons, i, rng).picture for i in chosen]))


if __name__ == "__main__":
    cv2.setNumThreads(0)
    plan = loop.arguments("autoencoder", minutes=24, batch=8, rate=1.5e-3)
    loop.train(plan, build(), batches(plan), loss)
    vae = loop.averaged("autoencoder", build())
    print(f"held out: {decibels(vae, held_out_pictures()):.2f} dB")
    normalise(vae, torch.cat([batch for _, batch in zip(range(32), batches(plan), strict=False)]))
    vae.save_pretrained(FOLDER)
    print(f"normalised: {decibels(vae, held_out_pictures()):.2f} dB")
