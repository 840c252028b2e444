"""ControlNet-Union (xinsir's ControlNet++, 2024): one ControlNet for several types of control images, one or more at once.

Each image is embedded as a ControlNet's. A transformer turns the mean of the embedding and the type's own embedding into a
shift of its channels; the types that are shown are added to the embedding of time.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetUnionModel
from safetensors.torch import load_file
from torch import Tensor

from diffusion_kit.models.sources import tensor_shapes
from diffusion_kit.models.unet import Net
from diffusion_kit.sampling.doors import Conditioning, Tree, spread

from .control import Control, EncodedControl, Site
from .controlnet import RunControlNet, built, count, embed, encoded, encoder_config
from .pictures import picture_tensor

MODELS = (ControlNetUnionModel,)
BY_TYPE = True  # its control images are a mapping from types

# Published networks have the first six of these types, or all ("ProMax").
TYPES = (
    ("openpose", "pose"),
    ("depth",),
    ("softedge", "hed", "pidinet", "sketch", "scribble"),
    ("lines", "canny", "lineart", "lineart_anime", "mlsd"),
    ("normal",),
    ("seg",),
    ("tile",),
    ("repaint",),
)
INDICES = {name: index for index, names in enumerate(TYPES) for name in names}


@dataclass(frozen=True)
class RunUnion(RunControlNet):
    """A ControlNet whose control images are (rows, types, C, H, W), `types` with the `scales` of each."""

    types: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def in_steps(self) -> RunControlNet:
        return self if self.own_forward else RunControlNet(self.net, self.half, self.own_forward)

    @property
    def embedding(self) -> tuple[Net, ...]:
        return (self.net,)

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        """Sum over the types k of s_k (e_k + P T(s_k (mean(e_k) + t_k))), (N, C, h, w).

        The peer hands rows to the transformer T as if they were tokens: the pictures of a batch see one another, and each
        token of a picture made alone sees itself only. So it is here for every row, and the same in every step.
        """
        parts = []
        for k, (index, scale) in enumerate(zip(self.types, self.scales, strict=True)):
            embedding = embed(self.net, image[:, k])
            token = scale * (embedding.mean((2, 3)) + self.net.task_embedding[index])[None]  # (1, N, C)
            for layer in self.net.transformer_layes:
                token = layer(token)
            parts.append(scale * (embedding + self.net.spatial_ch_projs(token[0])[..., None, None]))
        return torch.stack(parts).sum(0)

    def prepare(self, timesteps: Tensor, conditioning: Conditioning) -> Tree:
        prepared = super().prepare(timesteps, conditioning)
        sinusoids = self.net.control_type_proj(self._shown_types(timesteps, 1).flatten()).reshape(1, -1)
        return {**prepared, "emb": prepared["emb"] + self.net.control_add_embedding(sinusoids.to(self.net.dtype))}

    def _shown_types(self, like: Tensor, rows: int) -> Tensor:
        """(rows, all types), 1 for those that are shown."""
        shown = like.new_zeros(rows, self.net.config.num_control_type, dtype=self.net.dtype)
        for index in self.types:
            shown[:, index] = 1
        return shown

    def shown(self, image: Tensor) -> dict[str, Any]:
        return {
            "controlnet_cond": list(image.unbind(1)),
            "control_type": self._shown_types(image, len(image)),
            "control_type_idx": list(self.types),
            "conditioning_scale": list(self.scales),
        }

    def _peer(self, tensors: Tree, x: Tensor) -> list[Tensor]:
        """The pictures of a batch see one another in the network's own forward: they go through it one by one."""
        fixed = {name: tensors[name] for name in ("timesteps", "weights")}
        rows = []
        for k in range(len(x)):
            own = {name: value[k : k + 1] for name, value in tensors.items() if name not in fixed}
            rows.append(super()._peer({**own, **fixed}, x[k : k + 1]))
        return [torch.cat(outputs) for outputs in zip(*rows, strict=True)]


def encode(control: Control, site: Site) -> EncodedControl:
    """Embeds the images of all types once, as one hint; the network then runs as a ControlNet."""
    shown = _shown(control)
    scales: tuple[float, ...] = (1.0,)
    if len(shown) > 1:  # scales of types act inside the network, those of levels on its residuals
        scales = control.scales * len(shown) if len(control.scales) == 1 else control.scales
        control = replace(control, scale=1.0)
    if len(scales) != len(shown):
        raise ValueError(f"Control scale lists {len(scales)} types of a ControlNet-Union; its image has {len(shown)}")
    channels = control.model.config.conditioning_channels
    images = [picture_tensor(image, site.height, site.width, channels=channels) for _, image in shown]
    if any(len(image) > 1 for image in images):
        images = [spread(image, site.prompts, site.per_prompt, "a control's image") for image in images]
    types = tuple(index for index, _ in shown)
    numbers = tuple(float(scale) for scale in scales)
    return encoded(RunUnion, control, site, torch.stack(images, 1), types=types, scales=numbers)


def _shown(control: Control) -> list[tuple[int, Any]]:
    """Index of the type and control images, for each that is given.

    Raises:
        ValueError: not a mapping, a type that is not known or that the network does not have.
    """
    if not isinstance(control.image, Mapping) or not control.image:
        found = "an empty one" if isinstance(control.image, Mapping) else type(control.image).__name__
        raise ValueError(
            f"a ControlNet-Union is shown images by their type, such as {{'canny': image}}; its image is {found}"
        )
    count = control.model.config.num_control_type
    for name in control.image:
        if isinstance(name, str) and name not in INDICES:
            (near,) = difflib.get_close_matches(name, INDICES, 1, 0)
            raise ValueError(f"a ControlNet-Union has no type {name!r}; did you mean {near!r}?")
        if INDICES.get(name, name) not in range(count):
            index = f", number {INDICES[name]}" if name in INDICES else ""
            raise ValueError(f"this ControlNet-Union has {count} types, 0 to {count - 1}; it has no {name!r}{index}")
    return [(INDICES.get(name, name), image) for name, image in control.image.items()]


def from_file(file: str | Path, *, torch_dtype: torch.dtype | None = None) -> ControlNetUnionModel:
    """A ControlNet-Union from a .safetensors file in diffusers' layout.

    Raises:
        ValueError: it is cut short, or something else.
    """
    shapes = tensor_shapes(Path(file))

    def config() -> dict[str, Any]:
        types, width = shapes["task_embedding"]
        return encoder_config(shapes) | {
            "num_control_type": types,
            "num_trans_channel": width,
            "num_trans_layer": count(shapes, "transformer_layes."),
            "num_proj_channel": shapes["spatial_ch_projs.weight"][0],
            "addition_time_embed_dim": shapes["control_add_embedding.linear_1.weight"][1] // types,
        }

    wrong = f"{file} is no ControlNet-Union in diffusers' layout"
    return built(ControlNetUnionModel, config, load_file(file), wrong).to(torch_dtype)


FILES = {"controlnet_union": from_file}
