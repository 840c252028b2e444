"""Pictures to latents and back, through an AutoencoderKL, an AutoencoderTiny, or Kandinsky's MoVQ (VQModel)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from diffusion_kit.sampling.engines import Engine, eager
from diffusion_kit.sampling.engines.weights import replaced
from diffusion_kit.sampling.noise import Generators

from .attention import locked


def scale_factor(vae: Any) -> int:
    """Pixels of a latent's side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_picture(
    vae: Any,
    pixels: Tensor,
    generator: Generators,
    dtype: torch.dtype,
    *,
    upcast: bool = True,
    engine: Engine = eager,
) -> Tensor:
    """Latents (N, C, h, w) of pictures (N, 3, H, W) in [-1, 1], sampled from the encoder's posterior.

    With a list of generators picture k is drawn from generator k; a picture that is there several times is encoded once.
    """
    with _upcast(vae, upcast):
        pixels = pixels.to(vae.dtype)
        if isinstance(generator, (list, tuple)):
            pictures, which = pixels.unique_consecutive(dim=0, return_inverse=True)
            found = [_encoded(vae, picture[None], engine) for picture in pictures]
            latents = torch.cat([_drawn(found[k], own) for k, own in zip(which.tolist(), generator, strict=True)])
        else:
            latents = _drawn(_encoded(vae, pixels, engine), generator)
    shift, std = statistics(vae, latents)
    return ((latents - shift) * (scaling(vae) / std)).to(dtype)


@torch.no_grad()
def encode_mode(vae: Any, pixels: Tensor, *, upcast: bool = True, engine: Engine = eager) -> Tensor:
    """The mode of the encoder's posterior (N, C, h, w), not scaled, of pictures (N, 3, H, W) in [-1, 1]."""
    with _upcast(vae, upcast):
        found = _encoded(vae, pixels.to(vae.dtype), engine)
    return found if isinstance(found, Tensor) else found.mode()


@torch.no_grad()
def decode_latents(
    vae: Any, latents: Tensor, *, upcast: bool = True, engine: Engine = eager, **beside: Tensor
) -> Tensor:
    """Pictures (N, 3, H, W), about [-1, 1], of latents.

    Args:
        upcast: run in float32 where the configuration says that float16 overflows.
        beside: what an AsymmetricAutoencoderKL sees as well: `image` (N, 3, H, W) in [-1, 1], `mask` (N, 1, H, W).

    Raises:
        RuntimeError: the decoder overflowed (float16), or the latents are not finite: both would be a black picture.
    """
    if not torch.isfinite(latents).all():
        raise RuntimeError("the latents are not finite: the UNet overflowed, or the scheduler diverged")
    with _upcast(vae, upcast):
        latents = latents.to(vae.dtype)
        shift, std = statistics(vae, latents)
        seen = {name: value.to(latents) for name, value in beside.items()}
        run = _engine(vae, cut(vae, latents), engine, "Decoder").network(Decoder(vae))
        pixels = run(latents * (std / scaling(vae)) + shift, seen)
    if not torch.isfinite(pixels).all():
        raise RuntimeError(
            f"the VAE overflowed in {str(vae.dtype).removeprefix('torch.')}: use pipe.vae.to(torch.float32), "
            "force_upcast in its config, or a VAE made for half precision (madebyollin/sdxl-vae-fp16-fix)"
        )
    return pixels


def _engine(vae: Any, pieces: bool, engine: Engine, half: str) -> Engine:
    """The engine, where it can take half of the autoencoder for the whole of what it does."""
    if pieces:  # they go through its own loop
        return eager
    if engine is eager or engine.only_steps or (name := replaced(vae)) is None:
        return engine
    engine.cannot(half, RuntimeError(f"the autoencoder's {name} was replaced"))
    return eager


def cut(vae: Any, values: Tensor, kind: Literal["latent", "sample"] = "latent") -> bool:
    """Whether the autoencoder takes these latents, or these pictures ("sample"), (N, C, height, width) in pieces."""
    tiles = getattr(vae, "use_tiling", False) and max(values.shape[2:]) > getattr(vae, f"tile_{kind}_min_size")
    return tiles or (getattr(vae, "use_slicing", False) and len(values) > 1)


@dataclass(frozen=True)
class Encoder:
    """The half of an autoencoder that reads pictures, as engines take it. It gives {"moments": (N, 2C, h, w)}, mean and
    logarithm of the variance, or {"latents": (N, C, h, w)} of an autoencoder whose latents are no distribution."""

    vae: Any

    @property
    def executed(self) -> tuple[Any, ...]:
        return _parts(self.vae, "encoder", "quant_conv")

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        out = self.vae.encode(pixels)
        return {"moments": out.latent_dist.parameters} if hasattr(out, "latent_dist") else {"latents": out.latents}


@dataclass(frozen=True)
class Decoder:
    """The half of an autoencoder that makes pictures, as engines take it."""

    vae: Any

    @property
    def executed(self) -> tuple[Any, ...]:
        return _parts(self.vae, "post_quant_conv", "decoder")

    def __call__(self, latents: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        options: dict[str, Any] = dict(beside)
        if isinstance(self.vae, VQModel):
            options["force_not_quantize"] = True  # the diffusion model works between the codes
        return self.vae.decode(latents, return_dict=False, **options)[0]


@contextmanager
def _upcast(vae: Any, wanted: bool) -> Iterator[None]:
    """float32 inside the block for a VAE that says it overflows in float16; no other thread runs it meanwhile."""
    with locked(vae):
        dtype = vae.dtype
        if not wanted or dtype != torch.float16 or not vae.config.get("force_upcast"):
            yield
            return
        vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            vae.to(dtype=dtype)


def _parts(vae: Any, *names: str) -> tuple[Any, ...]:
    parts = (getattr(vae, name, None) for name in names)
    return tuple(part for part in parts if part is not None)


def _encoded(vae: Any, pixels: Tensor, engine: Engine) -> DiagonalGaussianDistribution | Tensor:
    """The posterior of pictures, or their latents where the autoencoder has none."""
    made = _engine(vae, cut(vae, pixels, "sample"), engine, "Encoder").network(Encoder(vae))(pixels)
    return DiagonalGaussianDistribution(made["moments"]) if "moments" in made else made["latents"]


def _drawn(found: DiagonalGaussianDistribution | Tensor, generator: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.sample(generator)


def scaling(vae: Any) -> float:
    """A VQModel has a scaling_factor in its configuration that nobody applies."""
    return 1.0 if isinstance(vae, VQModel) else vae.config.scaling_factor


def statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents where the config gives them, else 0 and 1; (1, C, 1, 1)."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return like.new_zeros(1), like.new_ones(1)
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


@torch.no_grad()
def preview_matrix(vae: Any) -> Tensor:
    """(C + 1, 3): the affine map from latents to RGB in [-1, 1] that is nearest to the VAE on plain colours.

    27 colours are encoded and RGB is fitted on their latents by least squares; made once for a VAE and kept.
    """
    if (made := getattr(vae, "_preview_matrix", None)) is not None:
        return made
    levels = torch.tensor([-0.8, 0.0, 0.8])
    colours = torch.cartesian_prod(levels, levels, levels)  # (27, 3)
    side = 8 * scale_factor(vae)
    device = get_module_execution_device(vae)
    pixels = colours[:, :, None, None].expand(-1, -1, side, side).to(device)
    latents = encode_picture(vae, pixels, torch.Generator(device).manual_seed(0), torch.float32)
    centres = latents[:, :, 3:5, 3:5].mean((2, 3)).cpu()
    inputs = torch.cat([centres, torch.ones(len(centres), 1)], 1)
    matrix = torch.linalg.lstsq(inputs, colours).solution
    object.__setattr__(vae, "_preview_matrix", matrix)
    return matrix


def preview(matrix: Tensor, latents: Tensor) -> Tensor:
    """(B, 3, h, w) in [0, 1]: a small picture of predicted clean latents (B, C, h, w)."""
    matrix = matrix.to(latents.device)
    rgb = torch.einsum("bchw,cr->brhw", latents.float(), matrix[:-1]) + matrix[-1][None, :, None, None]
    return (rgb / 2 + 0.5).clamp(0, 1)
