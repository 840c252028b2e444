"""Depth, by the networks of transformers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_kit.adapters.detectors._networks import widened
from diffusion_kit.models.sources import PICKLES, locate, one_line, read_json

RESOLUTION = 518  # Depth Anything's; the others bring the picture to their own
MODELS = {
    "depth_anything": "depth-anything/Depth-Anything-V2-Small-hf",  # Yang et al., 2024, arXiv:2406.09414
    "dpt": "Intel/dpt-large",  # Ranftl et al., 2021, arXiv:2103.13413
    "midas": "Intel/dpt-hybrid-midas",  # Ranftl et al., 2020, arXiv:1907.01341
    "zoe": "Intel/zoedepth-nyu-kitti",  # Bhat et al., 2023, arXiv:2302.12288
}
EITHER = ("depth_anything", "prompt_depth_anything")  # disparity, or metric where their config says so
DISPARITY = ("dpt",)  # large is near
METRIC = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")  # large is far
FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
KINDS = (*EITHER, *DISPARITY, *METRIC)
SHOWN = (2, 85)  # percentiles of metric depth between which ZoeDepth's pictures for control networks are drawn
UNUSED = ("fusion_stage.layers.0.residual_layer1", "mask_token")  # never run, and left out of published files


def detect(image: Image.Image, *, model: Any = None) -> Image.Image:
    """How near things are: 16-bit greyscale (mode "I;16"), white is the nearest of the picture and black the farthest.

    Disparity is used as it is. Metric depth is turned round, between its 2nd and 85th percentile, as control networks for
    depth were trained with: one far sky would leave no greys for the rest. Where all is equally far, all is black.

    Args:
        model: a folder, a hub id, or "depth_anything" (the default), "dpt", "midas" or "zoe".

    Raises:
        FileNotFoundError, ValueError: no such model, or one that cannot be used; in one line.
    """
    processor, net = _network(_place(model))
    seen = widened(image)
    with torch.no_grad():
        outputs = net(**processor(images=seen, return_tensors="pt"))
    # its second argument is the size to come back to: `source_sizes` of ZoeDepth, `target_sizes` of all others
    (found,) = processor.post_process_depth_estimation(outputs, [seen.size[::-1]])
    depth = found["predicted_depth"].double().numpy()
    if net.config.model_type in METRIC or getattr(net.config, "depth_estimation_type", None) == "metric":
        depth = -depth.clip(*np.percentile(depth, SHOWN))
    return _scaled(depth)


def missing(model: Any = None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        place = _place(model)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if isinstance(place, Path) or all(isinstance(try_to_load_from_cache(place, file), str) for file in FILES):
        return None
    return f"detector depth needs {place}: it is not in the hub's cache, the first run asks the hub for it"


def _scaled(nearness: np.ndarray) -> Image.Image:
    least, most = nearness.min(), nearness.max()
    rounding = 1e-5 * max(abs(least), abs(most))  # of the network's 32 bits: no depth to be seen in it
    scaled = (nearness - least) / (most - least) if most - least > rounding else np.zeros_like(nearness)
    return Image.fromarray((scaled * 65535).round().astype(np.uint16))


def _place(model: Any) -> Path | str:
    """The hub id of a depth model, or its folder once its files are seen."""
    source = "depth_anything" if model is None else model
    place = locate(MODELS.get(str(source), source))
    if isinstance(place, str):
        return place
    if place.is_file():
        raise ValueError(f"{place} is one file: a depth model is a folder with config.json, or a hub id")
    _check_kind(place, read_json(place / "config.json", "depth model").get("model_type"))
    read_json(place / "preprocessor_config.json", "depth model")  # how pictures are scaled for the network
    if not any(place.glob("*.safetensors")):
        pickles = [file.name for file in place.iterdir() if file.suffix in PICKLES]
        has = f"only {pickles[0]}, a pickle, which can run any code when opened" if pickles else "none"
        raise FileNotFoundError(f"detector depth needs model.safetensors: {place} has {has}")
    return place


def _check_kind(place: Path | str, kind: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"{place} is no depth model: its model_type is {kind!r}; known are {', '.join(KINDS)}")


@lru_cache(maxsize=2)
def _network(place: Path | str) -> tuple[Any, Any]:
    """A model's image processor and network."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation
    from transformers.utils import logging

    options: dict[str, Any] = {"trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its many lines about tensors that do not fit are one below
    try:
        with one_line(place, "depth model"):
            _check_kind(place, AutoConfig.from_pretrained(place, **options).model_type)
            processor = AutoImageProcessor.from_pretrained(place, **options)
            options |= {"use_safetensors": True, "dtype": torch.float32}
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            net, report = AutoModelForDepthEstimation.from_pretrained(place, **options)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{place} cannot be used as a depth model: {' '.join(str(error).split())[:200]}") from None
    finally:
        logging.set_verbosity(verbosity)
    lacks = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lacks = {key for key in lacks if not any(part in key for part in UNUSED)}
    if lacks:
        raise ValueError(f"{place} does not fit {type(net).__name__}: it lacks {len(lacks)} tensors, as {min(lacks)}")
    return processor, net.eval()
