"""How fast a folder is written and read in the ways that DeepSpeed's offload to NVMe can be told ("aio")."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .operators import builder, load

BYTES = 64 * 2**20  # of one transfer; a piece of moments that is swapped is of this order
TIMES = 3  # each way; the median counts
WAYS = {
    "block_size": (2**18, 2**20, 2**23),
    "queue_depth": (8, 32, 128),
    "intra_op_parallelism": (1, 2, 4),
    "single_submit": (False, True),
    "overlap_events": (True, False),
}
Way = dict[str, Any]


def tune(folder: str | Path, say: Callable[[str], None], ways: dict[str, tuple[Any, ...]] = WAYS) -> Way:
    """The fastest way for a folder, written and read equally often; best one value after the other.

    Raises:
        FileNotFoundError, ValueError: no folder, or one that cannot be used. RuntimeError: libaio is missing, in one line.
        ImportError: DeepSpeed is not installed.
    """
    place = checked(Path(folder))
    load(builder("PinMemoryBuilder"))
    module = load(builder("AsyncIOBuilder"))
    best: Way = {name: values[0] for name, values in ways.items()}
    with tempfile.TemporaryDirectory(dir=place, prefix="aio-") as inside:

        def measured(way: Way) -> float:
            written, read = speeds(module, Path(inside) / "transfer", way)
            say(f"aio: {line(way)}: written at {written:.2f} GB/s, read at {read:.2f} GB/s")
            return 2 / (1 / written + 1 / read)  # bytes written and read again over the seconds that both took

        fastest = measured(best)
        for name, value in steps(ways):
            way = {**best, name: value}
            if (speed := measured(way)) > fastest:
                best, fastest = way, speed
    return best


def steps(ways: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    return itertools.chain.from_iterable(((name, value) for value in values[1:]) for name, values in ways.items())


def count() -> int:
    """How many ways are tried."""
    return 1 + len([*steps(WAYS)])


def line(way: Way) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in way.items())


def checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute()} to measure: name one on the NVMe, as nvme_path does")
    free = shutil.disk_usage(folder).free
    if free < 2 * BYTES:
        raise ValueError(f"{folder} has {free / 2**20:.0f} MiB left, and {2 * BYTES / 2**20:.0f} are needed to measure")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def speeds(module: Any, file: Path, way: Way) -> tuple[float, float]:
    """GB/s of writing and of reading, past the system's cache, as DeepSpeed does it."""
    order = ("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    handle = module.aio_handle(*(way[name] for name in order))
    buffer = handle.new_cpu_locked_tensor(BYTES, torch.empty(0, dtype=torch.uint8))
    try:
        seconds = [timed(handle, buffer, file) for _ in range(TIMES)]
    finally:
        handle.free_cpu_locked_tensor(buffer)
    writes, reads = (sorted(own)[TIMES // 2] for own in zip(*seconds, strict=True))
    return BYTES / writes / 1e9, BYTES / reads / 1e9


def timed(handle: Any, buffer: torch.Tensor, file: Path) -> tuple[float, float]:
    found = []
    for transfer in (handle.async_pwrite, handle.async_pread):
        start = time.perf_counter()
        if transfer(buffer, str(file), 0) == -1 or handle.wait() == -1:
            raise RuntimeError(
                f"{file.parent.parent} takes no direct transfers, as memory's file systems: take a disk's"
            )
        found.append(time.perf_counter() - start)
    return found[0], found[1]
