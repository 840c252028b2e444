"""Networks whose weights are spread over the processes of a group (ZeRO's stage 3, Rajbhandari et al. 2020, arXiv
1910.02054): each holds a part of every weight, and a layer has its own whole while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.modeling_utils import no_init_weights
from safetensors import safe_open

from .sources import weight_files


def load_spread(
    cls: Any, folder: Path, dtype: torch.dtype, settings: Mapping[str, Any], variant: str | None = None
) -> Any:
    """A network of diffusers from its folder, weight by weight: no process ever holds more than a layer of it.

    Args:
        settings: DeepSpeed's configuration, with `zero_optimization.stage` 3; the processes are joined already.
        variant: of the files, as "fp16".

    Raises:
        ValueError: the folder's files are not those of the network.
    """
    import deepspeed

    config = cls.load_config(str(folder))
    # Not by Init(dtype=...): without float16 in the processor DeepSpeed makes bfloat16 of whatever stands there.
    kinds = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    with deepspeed.zero.Init(config_dict_or_path={**settings, **kinds}), no_init_weights():
        net = cls.from_config(config)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    left = set(net.state_dict())
    for name, file in _tensors(folder, variant):
        if name not in left:
            raise ValueError(f"{folder} is no {cls.__name__} as its config.json says: it has no {name}")
        _fill(tensors[name], file, name)
        left.remove(name)
    if left:
        raise ValueError(f"{folder} is no whole {cls.__name__}: {min(left)} is missing")
    return net.eval()


def _tensors(folder: Path, variant: str | None) -> Iterator[tuple[str, Any]]:
    """Names of weights with their open files, in the same order in every process."""
    for path in weight_files(folder, variant):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file


@torch.no_grad()
def _fill(weight: Any, file: Any, name: str) -> None:
    """The first process reads it and sends the others their parts."""
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if tuple(file.get_slice(name).get_shape()) != shape:
        raise ValueError(f"{name} has shape {tuple(file.get_slice(name).get_shape())}, the network's is {shape}")
    if not is_spread(weight):
        weight.copy_(file.get_tensor(name))
        return
    with gathered([weight], changed=True):
        if dist.get_rank() == 0:
            weight.copy_(file.get_tensor(name))


def is_spread(weight: Any) -> bool:
    return hasattr(weight, "ds_id")


def gathered(weights: Iterable[Any], *, changed: bool = False) -> AbstractContextManager[Any]:
    """Inside the block every process holds these weights whole; all of them have to enter it.

    Args:
        changed: what the first process makes of them inside stays.
    """
    own = [weight for weight in weights if is_spread(weight)]
    if not own:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(own, modifier_rank=0 if changed else None)
