"""What need not be computed again in every epoch: latents, text embeddings and detected conditions, by content and setting.

A latent is kept as the mean and the deviation of its distribution, so that the draw stays each place's own. The settings
that shape an entry name its folder, the content of the picture and the view of it name the entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_kit import __version__
from diffusion_kit.models.spread import gathered
from diffusion_kit.training.config import Config

from .crops import Crop
from .keys import Keys
from .store import Store

Maker = tuple[nn.Module, list[Any]]  # a network whose answers are kept, and the settings around it that shape them


@dataclass
class Cache:
    """The stores that a configuration asks for, None where it does not; and by what their pictures are known."""

    latents: Store | None = None
    conditions: Store | None = None
    text: Store | None = None
    keys: Keys = field(default_factory=Keys)

    @property
    def stores(self) -> list[Store]:
        return [store for store in (self.latents, self.conditions, self.text) if store is not None]

    def flush(self) -> None:
        for store in self.stores:
            store.flush()
        self.keys.flush()


def open_cache(config: Config, pictured: Sequence[Maker], encoders: Sequence[Maker], conditioned: bool) -> Cache:
    """
    Args:
        pictured: make the latents, and of a Kandinsky decoder the embeddings; none where the target sees pixels.
        encoders: make the text embeddings; none where they are trained.

    Raises:
        ValueError: what makes latents or embeddings is trained.
    """
    own = config.cache
    if own.folder is None:
        return Cache()
    root = Path(own.folder).expanduser()
    cache = Cache(keys=Keys(root))
    if own.latents and pictured:
        if any(p.requires_grad for net, _ in pictured for p in net.parameters()):
            raise ValueError("cache.latents cannot keep what a network in training makes: set cache.latents=false")
        cache.latents = Store(root / f"latents-{digest([*map(made_by, pictured), own.dtype])}")
    if own.text and encoders:
        cache.text = Store(root / f"text-{digest([*map(made_by, encoders), own.dtype])}")
    detector = config.data.condition
    if own.conditions and conditioned and detector.detector is not None:
        settings = [detector.detector, sorted(detector.options.items()), detector.channels, __version__]
        settings += [
            (file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(detector.options.get("model"))
        ]
        cache.conditions = Store(root / f"{detector.detector}-{digest(settings)}")
    return cache


def weight_files(model: Any) -> list[Path]:
    """Of a detector's model where it is a folder or a file: others may come to lie there."""
    place = Path(str(model)) if model else Path()
    return sorted(place.rglob("*.safetensors")) if model and place.is_dir() else [place] if place.is_file() else []


def digest(values: Any) -> str:
    """Sixteen letters for values that JSON can write."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


def made_by(maker: Maker) -> list[Any]:
    net, settings = maker
    return [fingerprint(net), *settings]


def fingerprint(net: nn.Module) -> str:
    """Changes with any weight of a network, with its type and its configuration."""
    config: Any = getattr(net, "config", {})
    said = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    own = {name: value for name, value in said.items() if name[0] != "_" and "version" not in name}
    found = hashlib.sha256(f"{type(net).__name__}{json.dumps(own, sort_keys=True, default=str)}".encode())
    for name, value in net.state_dict(keep_vars=True).items():
        found.update(name.encode())
        with gathered([value]):
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def view_key(content: str, crop: Crop, flip: bool) -> str:
    """Of a view of a picture's content: the size it is scaled to, the part that is kept, and mirrored or not."""
    scaled, size = ("x".join(map(str, pair)) for pair in (crop.scaled, crop.size))
    return f"{content}-{scaled}-{size}+{crop.left}+{crop.top}{'-flip' if flip else ''}"


def caption_key(caption: str, zeros: bool) -> str:
    return "zeros" if zeros else hashlib.sha256(caption.encode()).hexdigest()[:32]


def picture_bytes(picture: Image.Image) -> Tensor:
    """(C, H, W) of eight or sixteen bits, as it is."""
    values = np.asarray(picture)
    values = values[..., None] if values.ndim == 2 else values
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def picture_of(values: Tensor) -> Image.Image:
    """The picture again."""
    array = values.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
