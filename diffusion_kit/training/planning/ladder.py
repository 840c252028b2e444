"""The ladder of the DeepSpeed document (how to choose which ZeRO stage and offloads), from the fastest to the leanest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from diffusion_kit.training.config import Config
from diffusion_kit.training.parallel.settings import get, read

from .footprint import Footprint, Place, Sizes, Way, footprint, overlap
from .trace import Trace

Tree = dict[str, Any]
CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/local_nvme"}
RUNGS: tuple[tuple[str, Tree], ...] = (  # each on top of those before it
    ("as it is", {}),
    ("one picture at once", {"micro_batch": 1}),
    ("gradient checkpointing", {"gradient_checkpointing": True}),
    ("ZeRO-2", {"stage": 2}),
    ("+ optimizer offload", {"offload_optimizer": CPU}),
    ("ZeRO-3", {"stage": 3, "offload_optimizer": None}),
    ("+ parameter offload", {"offload_param": CPU}),
    ("+ optimizer offload", {"offload_optimizer": CPU}),
    ("NVMe", {"offload_param": NVME, "offload_optimizer": NVME}),
)
OWN = ("micro_batch", "gradient_checkpointing")  # keys of the kit; the others are DeepSpeed's zero_optimization


@dataclass(frozen=True)
class Rung:
    """
    Attributes:
        keys: of the configuration that give it.
        overlap: bytes that overlap_comm would take, by the document.
    """

    name: str
    keys: Tree
    way: Way
    need: Footprint
    overlap: float

    @property
    def arguments(self) -> str:
        """As a command line takes it."""
        return shlex.join(f"{name}={json.dumps(value)}" for name, value in self.keys.items())

    def fits(self, memory: float, host: float | None) -> bool:
        """
        Args:
            memory: bytes for a process; `host` those of the machine's, None where it is not known, or the same.
        """
        device, beside, _ = self.need.sums
        if self.way.cpu:
            return device + beside <= memory
        return device <= memory and (host is None or beside <= host)


def ladder(
    config: Config, own: Sizes, processes: int, traces: Callable[[bool, int], Trace | None], *, cpu: bool
) -> Iterator[Rung]:
    """Rungs from the configuration as it is downwards; those that it stands below already are left out.

    Args:
        traces: of a micro-batch with gradient checkpointing or without, of so many pictures; None where it cannot be.
    """
    tree = read(config.deepspeed) if config.deepspeed is not None else {}
    stage = get(tree, "zero_optimization.stage")
    keys: Tree = {}
    for name, more in RUNGS:
        if "stage" in more and stage is not None and more["stage"] < stage:
            continue
        if "micro_batch" in more and micro_of(config, {}, processes) == 1:
            continue
        if more.get("gradient_checkpointing") and (config.gradient_checkpointing or traces(True, 1) is None):
            continue
        keys = changed(config, keys, more)
        way = way_of(config, keys, processes, cpu=cpu)
        found = traces(way.checkpointing, way.micro)
        assert found is not None
        yield Rung(name, keys, way, footprint(own, way, found), overlap(way, own.half) if way.stage in (1, 2) else 0)


def changed(config: Config, keys: Tree, more: Tree) -> Tree:
    """The keys of one more rung."""
    keys = deepcopy(keys) | {name: value for name, value in more.items() if name in OWN}
    zero = {name: value for name, value in more.items() if name not in OWN}
    if not zero:
        return keys
    given = read(config.deepspeed) if config.deepspeed is not None else {}
    tree = keys.get("deepspeed") or deepcopy(given)
    node = tree.setdefault("zero_optimization", {})
    node |= {name: value for name, value in zero.items() if value is not None}
    for name in (name for name, value in zero.items() if value is None and name in node):
        del node[name]
    if config.optimizer.name != "adamw":
        tree["zero_allow_untested_optimizer"] = True
    return keys | {"deepspeed": tree}


def micro_of(config: Config, keys: Tree, processes: int) -> int:
    share = int(config.batch) // processes
    return min(share, keys.get("micro_batch") or config.micro_batch or share)


def way_of(config: Config, keys: Tree, processes: int, *, cpu: bool) -> Way:
    """How a configuration with these keys is run; `batch` stays what it is."""
    tree = keys.get("deepspeed") or (read(config.deepspeed) if config.deepspeed is not None else None)
    zero = (tree or {}).get("zero_optimization", {})
    micro = micro_of(config, keys, processes)

    def place(name: str) -> Place:
        found = get(zero, f"{name}.device")
        return found if found in ("cpu", "nvme") else "device"

    return Way(
        processes=processes,
        micro=micro,
        count=-(-int(config.batch) // processes // micro),
        checkpointing=bool(keys.get("gradient_checkpointing", config.gradient_checkpointing)),
        stage=None if tree is None else int(zero.get("stage") or 0),
        optimizer=place("offload_optimizer"),
        weights=place("offload_param"),
        spread=config.base.spread is not False,
        cpu=cpu,
        zero=zero,
    )
