"""The processors of this machine, and which of them a process is given; its memory."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import torch

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def sockets(root: Path = TOPOLOGY) -> list[list[int]]:
    """Cores that this process may use, by the processor that they are on."""
    found: dict[str, list[int]] = defaultdict(list)
    for core in sorted(os.sched_getaffinity(0)):
        file = root / f"cpu{core}" / "topology" / "physical_package_id"
        found[file.read_text().strip() if file.is_file() else "0"].append(core)
    return list(found.values())


def processes(wanted: int | None) -> int:
    """On this machine: as many as were asked for, or one a GPU, or one a processor."""
    return wanted or torch.cuda.device_count() or len(sockets())


def share(rank: int, count: int) -> list[int]:
    """Cores of one process among several: whole processors, or a part of one."""
    own = sockets()
    if count <= len(own):
        return [core for k, cores in enumerate(own) if k * count // len(own) == rank for core in cores]
    each, place = -(-count // len(own)), rank
    cores = own[place // each]
    size = len(cores) // each
    first = place % each * size
    return cores[first : first + size] if size else cores


def threads(count: int) -> int:
    """For each of so many processes."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def memory() -> int:
    """Bytes of this machine, or of the control group that this process is in."""
    own = [int(text) for file in CGROUPS if Path(file).is_file() and (text := Path(file).read_text().strip()).isdigit()]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return min([*own, int(available.split()[1]) * 1024])
