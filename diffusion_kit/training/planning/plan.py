"""A plan of a training: what its networks take, the first rung of the ladder that fits, and what many devices gain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from diffusion_kit.training.config import Config
from diffusion_kit.training.launching import machine
from diffusion_kit.training.memory import limit
from diffusion_kit.training.parallel.settings import derived

from . import report
from .footprint import Sizes, footprint, sizes
from .ladder import Rung, ladder
from .scaling import Machines
from .trace import Trace, trace
from .weightless import make_weightless, weightless


@dataclass
class Networks:
    """A configuration's networks without weights, measured when they are asked for.

    Attributes:
        cpu: whether the training is to run on CPUs.
    """

    config: Config
    cpu: bool
    found: dict[bool, tuple[Sizes, Trace, Trace] | None] = field(default_factory=dict)

    def measured(self, checkpointing: bool) -> tuple[Sizes, Trace, Trace] | None:
        """Sizes, and micro-batches of one picture and of two; None where the target has no gradient checkpointing."""
        if checkpointing not in self.found:
            with weightless():
                self.found[checkpointing] = self._measured(checkpointing)
        return self.found[checkpointing]

    def _measured(self, checkpointing: bool) -> tuple[Sizes, Trace, Trace] | None:
        target = make_weightless(self.config)
        if checkpointing:
            try:
                target.checkpoint_gradients()
            except ValueError:
                return None
        one, two = (trace(target, self.config, size, cpu=self.cpu) for size in (1, 2))
        return sizes(target, self.config, cpu=self.cpu), one, two

    def sizes(self) -> Sizes:
        found = self.measured(self.config.gradient_checkpointing)
        if found is None:
            raise ValueError("gradient_checkpointing: this target has none, set it to false")
        return found[0]

    def trace(self, checkpointing: bool, micro: int) -> Trace | None:
        """Of a micro-batch of any size: all that it takes is a straight line."""
        found = self.measured(checkpointing)
        return None if found is None else found[1].times(found[2], micro)


def plan(
    config: Config,
    say: Callable[[str], None],
    devices: int | None = None,
    given: Mapping[str, float] | None = None,
) -> Rung | None:
    """Says what a training takes, rung by rung up to the first that fits, and of many devices what they send.

    Args:
        devices: how many, none of which need be here; None: as many processes as would be launched.
        given: `memory` of a device in GB, else what this machine has; of its rates what is another than in `Machines`.

    Returns:
        the rung that fits.

    Raises:
        FileNotFoundError, ValueError: a base that is not here, a batch that cannot be shared; nothing fits.
    """
    given = given or {}
    processes = devices or machine.processes(config.launch.processes) * config.launch.machines
    cpu = devices is None and not torch.cuda.is_available()
    config = derived(config, processes)
    networks = Networks(config, cpu)
    room, host = rooms(config, processes, given.get("memory"), cpu=cpu, here=devices is None)
    shared = config.batch != "auto" and int(config.batch) % processes == 0
    if not shared and devices is None:
        told = (
            "auto: a plan needs a number" if config.batch == "auto" else f"not shared evenly by {processes} processes"
        )
        raise ValueError(f"batch is {config.batch}, {told}")
    say(report.networks(networks.sizes(), config))
    found = climb(config, networks, processes, room, host, say) if shared else None
    if devices is not None:
        machines = Machines.of(room, given)
        lean = found.way.checkpointing if found else config.gradient_checkpointing
        say(report.scaling(networks, config.model_copy(update={"gradient_checkpointing": lean}), devices, machines))
    if shared and found is None:
        raise ValueError(report.nothing_fits(room))
    return found


def climb(
    config: Config,
    networks: Networks,
    processes: int,
    room: float,
    host: float | None,
    say: Callable[[str], None],
) -> Rung | None:
    """The first rung that fits; says each that it tries."""
    rungs = ladder(config, networks.sizes(), processes, networks.trace, cpu=networks.cpu)
    say(report.head(config, processes, room, host, cpu=networks.cpu))
    for rung in rungs:
        fits = rung.fits(room, host)
        say(report.row(rung, fits))
        if fits:
            share = rung.way.micro * rung.way.count
            sizes = (size for size in range(share, rung.way.micro, -1) if share % size == 0)
            more = next((size for size in sizes if taking(rung, size, networks).fits(room, host)), None)
            say(report.chosen(rung, more))
            return rung
    return None


def taking(rung: Rung, micro: int, networks: Networks) -> Rung:
    """The same rung with more pictures at once."""
    way = replace(rung.way, micro=micro, count=rung.way.micro * rung.way.count // micro)
    found = networks.trace(way.checkpointing, micro)
    assert found is not None
    return replace(rung, way=way, need=footprint(networks.sizes(), way, found))


def rooms(config: Config, processes: int, wanted: float | None, *, cpu: bool, here: bool) -> tuple[float, float | None]:
    """Bytes that a process may take on its device, which the user may have said in GB, and of the host's memory beside it,
    None where that is not known.

    Processes on CPUs share their machine's memory.
    """
    local = machine.processes(config.launch.processes) if here else processes
    told = wanted * 1e9 if wanted is not None else None
    own = limit(torch.device("cpu")) / local
    if cpu:
        return told or own, None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return told or limit(device), own if here else None
