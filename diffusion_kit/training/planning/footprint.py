"""Bytes that each process of a training holds, by what they are.

The states are those of the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1), buffers those of DeepSpeed
0.19's code; what activations take is measured (`trace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from diffusion_kit.training.bases import DTYPES
from diffusion_kit.training.config import Config, OptimizerConfig
from diffusion_kit.training.optimizers import make_optimizer
from diffusion_kit.training.parallel import spread
from diffusion_kit.training.targets.target import Target

from .trace import Trace, networks

FULL = 4  # bytes of a float32
# Bytes of the interpreter with torch, diffusers and transformers on a CPU, and with DeepSpeed: measured on trainings of
# three million numbers, less their own tensors (torch 2.14, DeepSpeed 0.19, Linux).
LIBRARIES, WITH_DEEPSPEED = 0.97e9, 1.07e9
HEAP = 0.07  # share by which a CPU's heap (glibc's) is larger than the tensors in it: 6 to 9 % were measured
DEFAULTS = {  # DeepSpeed's, in numbers
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_reuse_distance": 1e9,
}
Place = Literal["device", "cpu", "nvme"]
Parts = dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """Of the networks of a training.

    Attributes:
        trained: numbers that are trained; `spread` those of frozen networks that ZeRO's stage 3 can spread.
        weights: numbers of each of these weights, the trained ones first (`count` of them).
        width: bytes of a number of a frozen network, `half` of a trained one where ZeRO holds it in half precision.
        frozen: bytes of the other frozen networks, on the device; `away` of those that a full cache leaves on the host.
        moment: bytes of the optimizer's state for a number; `average` those of the average of the weights.
    """

    trained: int
    spread: int
    weights: tuple[int, ...]
    count: int
    width: int
    half: int
    frozen: int
    away: int
    moment: float
    average: int

    def small(self, threshold: float) -> tuple[int, int]:
        """Numbers of weights that stage 3 keeps whole, trained and spread."""
        own = self.weights[: self.count], self.weights[self.count :]
        trained, frozen = (sum(n for n in part if n <= threshold) for part in own)
        return trained, frozen


def sizes(target: Target, config: Config, *, cpu: bool) -> Sizes:
    """Of a target, with or without values."""
    wide = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 3}}})
    spreadable: list[nn.Module] = spread(wide, target)
    trained = [own.numel() for own in target.parameters() if own.requires_grad]
    frozen = [own.numel() for net in spreadable for own in net.parameters()]
    counted = {id(own) for net in spreadable for own in net.parameters()}
    counted |= {id(own) for own in target.parameters() if own.requires_grad}
    away = {} if cpu else put_away(target, config)
    rest = {id(own): nbytes(own) for net in networks(target) for own in (*net.parameters(), *net.buffers())}
    rest = {key: value for key, value in rest.items() if key not in counted}
    return Sizes(
        trained=sum(trained),
        spread=sum(frozen),
        weights=(*trained, *frozen),
        count=len(trained),
        width=DTYPES[config.precision].itemsize,
        half=DTYPES[config.precision].itemsize,
        frozen=sum(value for key, value in rest.items() if key not in away),
        away=sum(value for key, value in rest.items() if key in away),
        moment=moment(config.optimizer),
        average=FULL if config.ema else 0,
    )


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def put_away(target: Target, config: Config) -> set[int]:
    """What a full cache moves off an accelerator, see `Base.put_away`."""
    base, own = target.base, config.cache
    if base is None or own.folder is None:
        return set()
    nets = [base.vae] * own.latents + [encoder for _, encoder in base.encoders] * own.text
    return {id(tensor) for net in nets for tensor in (*net.parameters(), *net.buffers())}


def moment(config: OptimizerConfig, numbers: int = 4096) -> float:
    """Bytes of an optimizer's state for a number: what it has after a step."""
    weight = nn.Parameter(torch.zeros(numbers))
    optimizer = make_optimizer(config, [weight])
    if hasattr(optimizer, "train"):
        optimizer.train()
    weight.grad = torch.zeros(numbers)
    optimizer.step()
    state = [own for own in optimizer.state[weight].values() if isinstance(own, torch.Tensor) and own.ndim]
    return sum(map(nbytes, state)) / numbers


@dataclass(frozen=True)
class Way:
    """How a training is run.

    Attributes:
        processes: in all. count: micro-batches of a process in a step.
        stage: of ZeRO; None: every process has all weights (DDP).
        optimizer, weights: where ZeRO keeps the optimizer's state, and the weights.
        spread: whether stage 3 spreads the frozen base too.
        zero: DeepSpeed's own settings.
    """

    processes: int
    micro: int
    count: int
    checkpointing: bool
    stage: int | None = None
    optimizer: Place = "device"
    weights: Place = "device"
    spread: bool = True
    cpu: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, name: str) -> float:
        value = self.zero.get(name)
        return DEFAULTS[name] if value in (None, "auto") else float(value)

    @property
    def overlapping(self) -> bool:
        told = self.zero.get("overlap_comm")
        return self.stage == 3 if told is None else bool(told)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a process on its device, on the host, on a disk, by what they are."""

    device: Parts
    host: Parts
    disk: Parts

    @property
    def sums(self) -> tuple[float, float, float]:
        device, host, disk = (sum(parts.values()) for parts in (self.device, self.host, self.disk))
        return device, host, disk


def footprint(own: Sizes, way: Way, trace: Trace) -> Footprint:
    """Of a process at its fullest."""
    parts = replicated(own, way, trace) if way.stage in (None, 0) else spread_out(own, way, trace)
    parts.host["frozen"] = own.away
    if way.cpu:
        parts.device["heap"] = HEAP * sum(parts.sums[:2])
        parts.device["libraries"] = LIBRARIES if way.stage is None else WITH_DEEPSPEED
    return parts


def replicated(own: Sizes, way: Way, trace: Trace) -> Footprint:
    """Every process has everything. Gradients of DDP lie in the buckets that are sent, and stay there; of the micro-batches
    before the last, which are not sent, they lie beside them. Those of one process rise while activations fall."""
    numbers, masters = own.trained, own.half if way.stage == 0 and own.half < FULL else 0
    beside = way.stage is None and way.processes > 1 and way.count > 1
    gradients = (FULL - masters) * numbers * (2 if beside else 1)
    alone = way.processes == 1 and way.count == 1 and way.stage is None
    activations = max(0, trace.rising - gradients) if alone else trace.activations
    device: Parts = {
        "frozen": own.frozen + own.width * own.spread,
        "weights": (FULL + masters) * numbers,
        "gradients": gradients,
        "moments": own.moment * numbers,
        "average": own.average * numbers,
        "activations": activations,
    }
    return Footprint(device, {}, {})


def spread_out(own: Sizes, way: Way, trace: Trace) -> Footprint:
    """ZeRO's stages 1 to 3: each process has its share of float32 weights and moments, of gradients and of weights."""
    share, places = own.trained / way.processes, {"device": Parts(), "cpu": Parts(), "nvme": Parts()}
    state, weights = places[way.optimizer], places[way.weights]
    state["masters"] = FULL * share
    state["moments"] = own.moment * share
    (places["cpu"] if way.optimizer != "device" else places["device"])["average"] = own.average * share
    device, host = places["device"], places["cpu"]
    if way.stage == 3:
        gathered(own, way, weights, device)
    else:
        device["frozen"] = own.frozen + own.width * own.spread
        device["weights"] = own.half * own.trained
    bucket = min(way.setting("reduce_bucket_size"), own.trained) * own.half
    kept = FULL * share if way.optimizer == "device" else 0
    if way.stage == 1 and way.count > 1:
        kept += own.half * own.trained  # of the micro-batches before
    device["gradients"] = kept
    # Activations are gone when the last bucket is copied to be sent, and of stage 3 its share comes back.
    device["activations"] = max(trace.activations, bucket + (own.half * share if way.stage == 3 else 0))
    device["buffers"] = bucket if way.cpu else buffers(way, own.half)
    if way.optimizer != "device":
        host["gradients"] = FULL * share
        host["buffers"] = own.half * share if way.optimizer == "cpu" else 4 * FULL * min(share, 1e9)
    return Footprint(device, host, places["nvme"])


def gathered(own: Sizes, way: Way, weights: Parts, device: Parts) -> None:
    """Stage 3: shares of the weights, and those that are whole for a while, or always since they are small."""
    trained, frozen = own.small(way.setting("stage3_param_persistence_threshold"))
    spread = own.spread if way.spread else 0
    frozen = frozen if way.spread else 0
    parted = own.half * (own.trained - trained) + own.width * (spread - frozen)
    device["frozen"] = own.frozen + own.width * (own.spread - spread)
    weights["weights"] = parted / way.processes
    device["small weights"] = own.half * trained + own.width * frozen
    numbers, ahead = own.trained + spread, 2 * way.setting("stage3_prefetch_bucket_size")
    device["gathered weights"] = own.half * (min(numbers, reused(way)) + min(numbers, ahead))


def reused(way: Way) -> float:
    """Numbers at the end of the networks that stay whole until the backward, which comes back to them as far behind the end
    as they lie before it."""
    return way.setting("stage3_max_reuse_distance") / 2


def buffers(way: Way, width: int) -> float:
    """Of gradients, on an accelerator: stages 1 and 2 have two of `reduce_bucket_size` where sending overlaps, else one."""
    return way.setting("reduce_bucket_size") * width * (2 if way.overlapping and way.stage != 3 else 1)


def overlap(way: Way, width: int = 2) -> float:
    """What the DeepSpeed document says of overlap_comm: 4.5 times both buckets (5e8 x 2 bytes x 2 x 4.5 = 9 GB)."""
    return 4.5 * (way.setting("reduce_bucket_size") + way.setting("allgather_bucket_size")) * width
