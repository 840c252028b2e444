"""What a plan says: tables that a terminal shows and a page of the docs holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from diffusion_kit.training.config import Config
from diffusion_kit.training.parallel.settings import read

from .footprint import Sizes, Way
from .ladder import Rung
from .scaling import BATCHES, WAYS, Machines, Step, best, step, steps
from .trace import Trace

FIGURES = ("device GB", "sent GB", "of it weights", "sending s", "TFLOP", "computing s", "bound by")


class Measured(Protocol):
    def sizes(self) -> Sizes: ...

    def trace(self, checkpointing: bool, micro: int) -> Trace | None: ...


def gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 99.95e9 else f"{value / 1e9:.0f}"


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Lines of a table in Markdown, the first with its rule below."""
    lines = [line(row) for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * (lines[0].count(" | ") + 1), *lines[1:]])


def line(values: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def networks(own: Sizes, config: Config) -> str:
    frozen = gb(own.frozen + own.away + own.width * own.spread)
    base = f", of which a UNet of {own.spread / 1e6:.1f} M numbers can be spread by ZeRO-3" if own.spread else ""
    return f"{config.target}: {own.trained / 1e6:.1f} M numbers are trained; {frozen} GB are frozen{base}\n"


def head(config: Config, processes: int, room: float, host: float | None, *, cpu: bool) -> str:
    shared = " as its share of the machine's" if cpu else ""
    beside = f" and {gb(host)} GB of the host" if host is not None else ""
    first = ("rung", "micro-batch x count", "device GB", "activations GB", "host GB", "disk GB", "overlap GB", "fits")
    limits = f"each of {processes} processes may take {gb(room)} GB{shared}{beside}"
    return f"{limits}; batch={config.batch} on every rung\n\n{table([first])}"


def row(rung: Rung, fits: bool) -> str:
    device, host, disk = map(gb, rung.need.sums)
    count = f"{rung.way.micro} x {rung.way.count}"
    buffers = gb(rung.overlap) if rung.overlap else "-"
    activations = gb(rung.need.device["activations"])
    return line((rung.name, count, device, activations, host, disk, buffers, "yes" if fits else "no"))


def chosen(rung: Rung, more: int | None) -> str:
    parts = ", ".join(f"{name} {gb(value)}" for name, value in rung.need.device.items() if value)
    lines = ["", f"a device holds, in GB: {parts}"]
    if rung.overlap:
        lines.append(
            f"with overlap_comm=true its buffers are {gb(rung.overlap)} GB, by DeepSpeed's document: 4.5 x "
            "(reduce_bucket_size + allgather_bucket_size); smaller buckets take less"
        )
    lines.append(f"use: {rung.arguments}" if rung.keys else "it fits as it is")
    return "\n".join([*lines, *([f"micro_batch={more} fits too, and is faster"] if more else [])])


def nothing_fits(room: float) -> str:
    return f"no rung of the ladder fits {gb(room)} GB a process: take more devices, smaller pictures, or precision=bf16"


# Many devices


def scaling(networks: Measured, config: Config, devices: int, machines: Machines) -> str:
    """What each way of sharing sends for one picture a device, and what every batch takes in the best way."""
    own, lean, zero = networks.sizes(), config.gradient_checkpointing, zero_of(config)

    def trace(micro: int) -> Trace:
        found = networks.trace(lean, micro)
        assert found is not None
        return found

    found = {
        batch: list(steps(batch, devices, own, trace, machines, zero, checkpointing=lean))
        for batch in BATCHES
        if batch % devices == 0
    }
    rows: list[tuple[str, ...]] = [("one picture a device", *FIGURES)]
    for name, (stage, spread) in WAYS.items():
        way = Way(devices, 1, 1, lean, stage, spread=spread, zero=zero)
        rows.append((name, *figures(step(name, own, way, trace(1), machines))))
    left = [str(batch) for batch in BATCHES if batch not in found]
    told = f"\na batch of {', '.join(left)} cannot be shared by {devices} devices\n" if left else ""
    return "\n\n".join([f"\n## {devices} devices", str(machines), table(rows), f"{batches(found)}\n{told}"])


def zero_of(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings of a configuration."""
    return read(config.deepspeed).get("zero_optimization", {}) if config.deepspeed is not None else {}


def figures(own: Step) -> tuple[str, ...]:
    sent = own.traffic
    return (
        gb(own.memory),
        gb(sent.bytes),
        gb(sent.weights),
        f"{own.sending:.3f}",
        f"{own.flops / 1e12:.0f}",
        f"{own.computing:.3f}",
        own.bound,
    )


def batches(found: dict[int, list[Step]]) -> str:
    first = ("batch", "use", "micro-batch x count", *FIGURES, "pictures/s")
    rows = []
    for batch, own in found.items():
        if not own:
            rows.append((str(batch), "nothing fits", *["-"] * 9))
            continue
        way = best(own)
        rate = batch / way.seconds
        rows.append((str(batch), way.name, f"{way.way.micro} x {way.way.count}", *figures(way), f"{rate:.0f}"))
    return table([first, *rows])
