"""What many devices gain: bytes and operations of a step, and which of them takes longer, for every way of sharing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .footprint import Sizes, Way, footprint
from .trace import Trace
from .traffic import Traffic, traffic

BATCHES = (128, 512, 2048, 4096, 8192, 16384)
WAYS = {  # stage of ZeRO, and whether the frozen base is spread
    "DDP": (None, False),
    "ZeRO-1": (1, False),
    "ZeRO-2": (2, False),
    "ZeRO-3, base whole": (3, False),
    "ZeRO-3, base spread": (3, True),
}


@dataclass(frozen=True)
class Machines:
    """What devices and links are taken to be.

    Attributes:
        memory: bytes of a device. rate: operations a second that it really makes.
        inside, between: bytes a second that a device sends within its machine, and to others. each: devices a machine.
        latency: seconds until a message is at the next device.
    """

    memory: float
    rate: float = 150e12
    inside: float = 300e9
    between: float = 25e9
    each: int = 8
    latency: float = 10e-6

    @classmethod
    def of(cls, memory: float, given: Mapping[str, float]) -> Machines:
        """Of a device's bytes of memory, TFLOPs and GB a second."""
        units = {"rate": 1e12, "inside": 1e9, "between": 1e9, "each": 1}
        return cls(memory, **{name: given[name] * unit for name, unit in units.items() if name in given})  # type: ignore[arg-type]

    def link(self, devices: int) -> float:
        """A ring is as fast as its slowest link."""
        return self.inside if devices <= self.each else self.between

    def __str__(self) -> str:
        return (
            f"devices of {self.memory / 1e9:.0f} GB and {self.rate / 1e12:.0f} TFLOP/s (sustained); each sends "
            f"{self.inside / 1e9:.0f} GB/s within a machine of {self.each}, {self.between / 1e9:.0f} GB/s between "
            f"machines, {self.latency * 1e6:.0f} us from one to the next"
        )


@dataclass(frozen=True)
class Step:
    """A step of one way.

    Attributes:
        memory: bytes of a device. flops: of a device. computing, sending: seconds.
    """

    name: str
    way: Way
    memory: float
    flops: float
    traffic: Traffic
    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        """Sending goes on beside computing, as far as it can."""
        return max(self.computing, self.sending)

    @property
    def bound(self) -> str:
        return "computing" if self.computing >= self.sending else "sending"


def sending(sent: Traffic, devices: int, machines: Machines) -> float:
    """Seconds: bytes over the slowest link, and N - 1 hops for every round."""
    return sent.bytes / machines.link(devices) + sent.rounds * (devices - 1) * machines.latency


def step(name: str, own: Sizes, way: Way, trace: Trace, machines: Machines) -> Step:
    sent = traffic(own, way)
    flops = trace.flops * way.count
    need = footprint(own, way, trace).sums[0]
    return Step(name, way, need, flops, sent, flops / machines.rate, sending(sent, way.processes, machines))


def steps(
    batch: int,
    devices: int,
    own: Sizes,
    traces: Callable[[int], Trace],
    machines: Machines,
    zero: Mapping[str, object],
    *,
    checkpointing: bool = False,
) -> Iterator[Step]:
    """A batch in every way of sharing, each with the largest micro-batch that fits; a way in which not one picture does is
    left out."""
    for name, (stage, spread) in WAYS.items():
        share = batch // devices
        for micro in (size for size in range(share, 0, -1) if share % size == 0):
            way = Way(devices, micro, share // micro, checkpointing, stage, spread=spread, zero=zero)
            found = step(name, own, way, traces(micro), machines)
            if found.memory <= machines.memory:
                yield found
                break


def best(found: list[Step]) -> Step:
    """The fastest, of equally fast ones (2 %) the simplest."""
    least = min(own.seconds for own in found)
    return next(own for own in found if own.seconds <= 1.02 * least)
