"""A network whose weights are spread over the processes, run for its answers only (stage 3 of ZeRO, "ZeRO-Inference").

Its forward gathers the weights of one module after the other from all processes. So all have to call it equally often,
whatever each makes of it: before every call they agree on who is still at work, and who is not runs the network along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion_kit.models.spread import load_spread

from .settings import Tree, check_filled, fill_zero, get, put, read, width_of

TRAINING = (  # what a configuration that a training shares may say, and has no use here
    "optimizer scheduler train_batch_size gradient_accumulation_steps gradient_clipping zero_optimization.offload_optimizer"
).split()
KINDS = {kind.__name__: kind for kind in (diffusers.UNet2DConditionModel, diffusers.Kandinsky3UNet)}
HALVES = {"fp16": "float16", "bf16": "bfloat16"}


def read_inference(file: str) -> Tree:
    """A configuration of stage 3, without what is for training.

    Raises:
        FileNotFoundError, ValueError: it is none, in one line.
    """
    tree = read(file)
    if (stage := get(tree, "zero_optimization.stage")) != 3:
        raise ValueError(f"deepspeed: zero_optimization.stage is {stage}: only stage 3 spreads weights, take 3")
    for name in TRAINING:
        *nodes, leaf = name.split(".")
        (tree[nodes[0]] if nodes else tree).pop(leaf, None)
    return tree | {"train_micro_batch_size_per_gpu": 1}


def dtype_said(tree: Tree, given: str | None) -> str:
    """The number type: as given, or of a configuration.

    Raises:
        ValueError: both say something, and not the same.
    """
    said = next((dtype for kind, dtype in HALVES.items() if get(tree, f"{kind}.enabled") is True), None)
    if None not in (said, given) and said != given:
        raise ValueError(f"deepspeed: {file_key(said)} is on, but --dtype is {given}: leave one of them out")
    return given or said or "float32"


def file_key(dtype: str | None) -> str:
    return next(f"{kind}.enabled" for kind, own in HALVES.items() if own == dtype)


def settle(tree: Tree, dtype: torch.dtype, net: Any) -> Tree:
    """Every value there; `net` says the width."""
    for kind, own in HALVES.items():
        if kind in tree or getattr(torch, own) == dtype:
            put(tree, f"{kind}.enabled", getattr(torch, own) == dtype)
    fill_zero(tree["zero_optimization"], width_of([net]), lambda line: None)
    check_filled(tree)
    return tree


class _Config:
    """A network's configuration in place of the network, before there is one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config


def load_inference(folder: Path, tree: Tree, dtype: torch.dtype) -> nn.Module:
    """The network of a folder, of which no process ever holds more than one layer whole.

    Raises:
        ValueError: weights are missing, or have other shapes.
    """
    config = json.loads((folder / "config.json").read_text())
    settle(tree, dtype, _Config(config))
    if (kind := KINDS.get(config["_class_name"])) is None:
        raise ValueError(f"{folder} holds a {config['_class_name']}; spread are {', '.join(KINDS)}")
    return load_spread(kind, folder, dtype, tree)


class Together:
    """Spreads a network, if it is not yet, and keeps the processes that run it at the same call.

    Attributes:
        running: in the middle of a call; if an error left it there, the other processes wait in theirs for ever.
    """

    def __init__(self, net: nn.Module, tree: Tree, dtype: torch.dtype) -> None:
        import deepspeed

        net.requires_grad_(False).eval()
        self.engine = deepspeed.initialize(model=net, config=settle(tree, dtype, net))[0]
        # The executor would call parts of it at other times.
        net.own_forward_only = "its processes keep step by it"  # type: ignore[assignment]
        self.net, self.running, self.along = net, False, False
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        net.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        net.register_forward_hook(self._after)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.along:
            self.inputs = args, kwargs
            self._agree(True)
        self.running = True

    def _after(self, *_: Any) -> None:
        self.running = False

    @torch.no_grad()
    def accompany(self) -> None:
        """Runs the network along, for nothing, as long as another process is at work."""
        while self._agree(False):
            assert self.inputs is not None
            args, kwargs = self.inputs
            self.along = True
            self.net(*args, **kwargs)
            self.along = False

    def _agree(self, working: bool) -> bool:
        """Whether any process is at work. One that had no call yet is given the inputs of another's."""
        own = torch.tensor([working, self.inputs is None])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        at_work = [rank for rank, state in enumerate(every) if state[0]]
        if at_work and any(state[1] for state in every):
            box = [_moved(self.inputs, "cpu") if working else None]
            dist.broadcast_object_list(box, src=at_work[0], device=torch.device("cpu"))
            if self.inputs is None:
                self.inputs = _moved(box[0], self.engine.device)
        return bool(at_work)


def _moved(inputs: Any, device: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)
