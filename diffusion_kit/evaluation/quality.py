"""How good the pictures are: FID, KID, CLIP score and LPIPS, each only with weights that the user names.

FID (Heusel et al., 2017, arXiv:1706.08500) and KID (Binkowski et al., 2018, arXiv:1801.01401) compare all pictures with
all photos, the CLIP score (Hessel et al., 2021, arXiv:2104.08718) each with its prompt, LPIPS (Zhang et al., 2018,
arXiv:1801.03924) each with its photo. FID of few pictures is far too large: it compares only at one number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_kit.adapters.detectors._networks import fill
from diffusion_kit.adapters.pictures import picture_tensor
from diffusion_kit.models.sources import locate, one_line, read_json

from .measures import Measure

UNNAMED = "no weights were named for it"


def quality_measures(
    *, inception: str | Path | None = None, clip: str | Path | None = None, lpips: str | Path | None = None
) -> tuple[Measure, ...]:
    """The four measures; those without weights are "not measured".

    Args:
        inception: .safetensors file of FID's Inception network (pt_inception-2015-12-05, converted).
        clip: folder of a CLIP model of transformers, with tokenizer and image processor.
        lpips: .safetensors file of torchvision's AlexNet; LPIPS's own weights over it come with torchmetrics.

    Raises:
        FileNotFoundError, ValueError: nothing there, a pickle, or of another network; in one line.
    """
    pair = None if inception is None else _pairs(_file(inception, "an Inception network"))
    similarity = None if clip is None else _clip(clip)
    distance = None if lpips is None else _lpips(_file(lpips, "an AlexNet"))

    def measure(name: str, larger_is_better: bool, compare: Callable[..., Any] | None, **more: Any) -> Measure:
        return Measure(name, larger_is_better, compare or _nothing, reason=None if compare else UNNAMED, **more)

    return (
        measure("FID", False, pair, figure=fid, of_sets=True, needs_photo=True),
        measure("KID", False, pair, figure=kid, of_sets=True, needs_photo=True),
        measure("CLIP score", True, similarity),
        measure("LPIPS", False, distance, needs_photo=True),
    )


def fid(rows: np.ndarray) -> float:
    """Of features (conditions, seeds, 2, D) of made pictures and their photos."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Given(rows.shape[-1]))
    metric.update(torch.from_numpy(rows[:, 0, 1]), real=True)  # each photo once
    metric.update(torch.from_numpy(rows[:, :, 0].reshape(-1, rows.shape[-1])), real=False)
    return float(metric.compute())


def kid(rows: np.ndarray) -> float:
    """The same by the unbiased estimate of the squared MMD, of all pictures at once; the mean over seeds."""
    from torchmetrics.image.kid import poly_mmd

    photos, made = torch.from_numpy(rows[:, 0, 1]).double(), torch.from_numpy(rows[:, :, 0]).double()
    return float(np.mean([float(poly_mmd(photos, made[:, s])) for s in range(made.shape[1])]))


class _Given(nn.Module):
    """In the place of a network, where features are ready."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _pairs(file: Path) -> Callable[[Image.Image, Any], np.ndarray]:
    """Features (2, D) of a picture and of its condition's photo, made once for two measures."""
    from .inception import features

    of = features(file)
    photos: dict[Any, np.ndarray] = {}
    last: list[Any] = [None, None]

    def pair(picture: Image.Image, condition: Any) -> np.ndarray:
        if last[0] is not picture:
            if condition not in photos:
                photos[condition] = of(condition.photo)
            last[:] = picture, np.stack([of(picture), photos[condition]])
        return last[1]

    return pair


def _clip(source: str | Path) -> Callable[[Image.Image, Any], float]:
    """100 x the cosine between a picture's and its prompt's embeddings, 0 where it is negative."""
    from transformers import CLIPModel, CLIPProcessor

    place = locate(source)
    if not isinstance(place, Path) or not place.is_dir():
        raise FileNotFoundError(f"{source} is no folder of a CLIP model")
    said = read_json(place / "config.json", "CLIP model").get("model_type")
    if said != "clip":
        raise ValueError(f"{place} is no CLIP model: its config.json says {said}")
    if not any(
        (place / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):  # transformers makes up an empty one
        raise FileNotFoundError(f"{place} is no CLIP model: it has no tokenizer.json and no vocab.json")
    with one_line(source, "CLIP model"):
        net, loading = CLIPModel.from_pretrained(place, use_safetensors=True, output_loading_info=True)
        if lost := sorted(loading["missing_keys"]):
            raise ValueError(f"{place} is no whole CLIP model: it has no {lost[0]}")
        net = net.eval()
        processor = CLIPProcessor.from_pretrained(place)

    @torch.no_grad()
    def score(picture: Image.Image, condition: Any) -> float:
        inputs = processor(text=[condition.prompt], images=[picture], return_tensors="pt", truncation=True)
        found = net(**inputs)  # its embeddings have length 1
        return 100 * max(0.0, float((found.image_embeds * found.text_embeds).sum()))

    return score


def _lpips(file: Path) -> Callable[[Image.Image, Any], float]:
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    net = _LPIPS(net="alex", pnet_rand=True)
    layers = fill(alexnet, file).features
    for own in (net.net.slice1, net.net.slice2, net.net.slice3, net.net.slice4, net.net.slice5):
        for name, layer in own.named_children():
            layer.load_state_dict(layers[int(name)].state_dict())

    @torch.no_grad()
    def distance(picture: Image.Image, condition: Any) -> float:
        made, photo = (picture_tensor(p, p.height, p.width) for p in (picture, condition.photo))
        return float(net(made, photo, normalize=True))

    return distance


def _file(source: str | Path, what: str) -> Path:
    place = locate(source)
    if not isinstance(place, Path) or not place.is_file():
        raise FileNotFoundError(f"{source} is no .safetensors file of {what}")
    return place


def _nothing(made: Any, wanted: Any) -> float:
    raise ValueError(UNNAMED)
