"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): a small network turns the control image into one residual for each
level of the UNet, once for the whole run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import MultiAdapter, T2IAdapter
from safetensors.torch import load_file
from torch import Tensor

from diffusion_kit.models.denoiser import residual_fit
from diffusion_kit.models.formats import unshuffled
from diffusion_kit.models.unet import Net, layout
from diffusion_kit.sampling.doors import Answer, Conditioning, Tree, in_every, spread

from .control import Control, EncodedControl, Mode, Site, bring, fading, in_branches
from .controlnet import built, count
from .pictures import as_list, picture_tensor

MODELS = (T2IAdapter, MultiAdapter)


@dataclass(frozen=True)
class MakeFeatures:
    """The adapter itself."""

    net: Net

    @property
    def executed(self) -> tuple[Net, ...]:
        return (self.net,)

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        return self.net(pixels)


@dataclass(frozen=True)
class AddFeatures:
    """The same residuals in every step."""

    executed = ()

    def __call__(self, tensors: Tree, x: Tensor, branches: int) -> Answer:
        return Answer(intra=tensors)


@dataclass
class EncodedFeatures(EncodedControl):
    features: tuple[Tensor, ...] = ()
    neutral: tuple[Tensor, ...] = ()
    mode: Mode = "balanced"

    def tensors(self, conditioning: Conditioning, branches: int) -> Tree:
        """The same in every branch that the mode knows; with guidance over them the neutral ones in the first."""
        spread = [in_branches(feature, self.mode, branches) for feature in self.features]
        if self.guidance is None or branches == 1:
            return tuple(spread)
        return tuple(torch.cat([first, rows[len(first) :]]) for first, rows in zip(self.neutral, spread, strict=True))

    def silence(self, branches: int) -> Answer:
        return Answer(intra=tuple(in_every(torch.zeros_like(feature), branches) for feature in self.features))


def encode(control: Control, site: Site) -> EncodedControl:
    """Runs the adapter once; scale, mask and fading are in the features afterwards."""
    neutral = () if control.guidance is None else _weighted(control.neutral, site)
    return EncodedFeatures(
        AddFeatures(),
        (control.start, control.end),
        guidance=control.guidance,
        features=_weighted(control, site),
        neutral=neutral,
        mode=control.mode,
    )


def _weighted(control: Control, site: Site) -> tuple[Tensor, ...]:
    adapters, images, shares = _nets(control)
    features: list[Tensor] = []
    for adapter, image, share in zip(adapters, images, shares, strict=True):
        rows = [spread(f, site.prompts, site.per_prompt, "a control's image") for f in _features(adapter, image, site)]
        outputs = [share * row for row in rows]
        features = [a + b for a, b in zip(features, outputs, strict=True)] if features else outputs
    _, intra = layout(site.unet, site.latent_size)
    multi = isinstance(control.model, MultiAdapter)
    scales = (1.0,) * site.levels if multi else control.level_scales(site.levels)
    weights = site.weights(control, fading(len(features), control.mode), intra[: len(features)], scales)
    return tuple((w * f).to(site.unet.dtype) for w, f in zip(weights, features, strict=True))


def multiple(model: Net) -> int:
    """What the output's sides must be multiples of."""
    nets = model.adapters if isinstance(model, MultiAdapter) else [model]
    return math.lcm(*(net.downscale_factor for net in nets))


def _nets(control: Control) -> tuple[list[T2IAdapter], list, list[float]]:
    """The adapters of a control, the image of each and its share of the sum."""
    if not isinstance(control.model, MultiAdapter):
        return [control.model], [control.image], [1.0]
    adapters, images = list(control.model.adapters), as_list(control.image)
    n = len(adapters)
    shares = [control.scales[0] / n] * n if len(control.scales) == 1 else list(control.scales)
    if len(images) != n or len(shares) != n:
        raise ValueError(f"a MultiAdapter of {n} nets needs {n} images and scales; got {len(images)} and {len(shares)}")
    return adapters, images, shares


def _features(adapter: Net, image: object, site: Site) -> list[Tensor]:
    """One tensor (N, C_k, h_k, w_k) for each level, checked against the base."""
    unshuffle = adapter.downscale_factor
    if site.height % unshuffle or site.width % unshuffle:
        raise ValueError(
            f"a T2I-Adapter with downscale {unshuffle} needs sides that it divides; {site.width} x {site.height} are not"
        )
    bring(adapter, site.device)
    channels = adapter.config.in_channels
    pixels = picture_tensor(image, site.height, site.width, channels=channels)  # type: ignore[arg-type]
    with torch.no_grad():
        features = site.engine.network(MakeFeatures(adapter))(pixels.to(site.device, adapter.dtype))
    fit = residual_fit(site.unet, site.latent_size)
    gives = [(f.shape[1], tuple(f.shape[2:])) for f in features]
    if gives != fit[: len(gives)]:
        raise ValueError(
            f"this T2I-Adapter does not fit the base: it gives {_text(gives)}, the UNet takes {_text(fit)}"
        )
    return features


def _text(shapes: list) -> str:
    return ", ".join(f"{channels} x {h} x {w}" for channels, (h, w) in shapes)


LEVELS = 4  # of published adapters


def from_file(file: str | Path, *, torch_dtype: torch.dtype | None = None) -> T2IAdapter:
    """A T2I-Adapter from a .safetensors file, in TencentARC's layout or in diffusers'.

    Raises:
        ValueError: it is cut short, or something else.
    """
    weights = _converted(load_file(file))
    wrong = f"{file} is no T2I-Adapter"
    net = built(T2IAdapter, lambda: _config({n: tuple(w.shape) for n, w in weights.items()}), weights, wrong)
    return net.to(torch_dtype)


def _converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under diffusers' names. TencentARC counts the residual blocks of a full adapter through all levels, and those
    of a light one in each."""
    if any(name.startswith("adapter.") for name in weights):
        return dict(weights)
    blocks = {int(name.split(".")[1]) for name in weights if re.match(r"body\.\d+\.block", name)}
    each = len(blocks) // LEVELS

    def renamed(match: re.Match) -> str:
        level, block = divmod(int(match[1]), each)
        return f"body.{level}." + (f"resnets.{block}.block" if match[2] == "block" else "in_conv")

    names = {name: re.sub(r"^body\.(\d+)\.(block|in_conv)", renamed, name) if each else name for name in weights}
    return {"adapter." + re.sub(r"(body\.\d+)\.body\.", r"\1.resnets.", names[name]): w for name, w in weights.items()}


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Configuration by the shapes of the tensors under diffusers' names."""
    factor, channels = unshuffled(shapes)
    if not factor:
        raise KeyError("first convolution that reads a picture")
    light = "adapter.body.0.out_conv.weight" in shapes
    last = "out_conv" if light else "resnets.0.block2"
    levels = count(shapes, "adapter.body.") - light  # a light one gives its last width twice
    return {
        "in_channels": channels,
        "channels": [shapes[f"adapter.body.{k}.{last}.weight"][0] for k in range(levels)],
        "num_res_blocks": count(shapes, "adapter.body.0.resnets."),
        "downscale_factor": factor,
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter",
    }


FILES = {"t2i_adapter": from_file}
