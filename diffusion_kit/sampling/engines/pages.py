"""Gives memory back that is a copy of a file's pages: who looks at it again reads the file. On Linux; elsewhere nothing."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

PAGEOUT = 21  # of madvise since Linux 5.4: changed pages are not lost, they stay or are swapped
EVERY = 0.05  # seconds


def page_out(nets: Iterable[nn.Module]) -> None:
    """Weights that lie in a file (see `weights.park`): their pages leave memory, changed ones are kept."""
    if sys.platform != "linux":
        return
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for net in nets for p in net.parameters()}
    mapped = [(first, last) for first, last, _, path in _maps() if path.startswith("/")]
    for start, size in storages.items():
        if any(first <= start < last for first, last in mapped):
            _advise(start, start + size, PAGEOUT)


@contextmanager
def without_pages_of(file: Path) -> Iterator[None]:
    """Meanwhile and afterwards pages of a file that somebody maps to read are given back again and again."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            _forget(file)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _forget(file)


def _forget(file: Path) -> None:
    for first, last, rights, path in _maps():
        if path == str(file) and "w" not in rights:
            _advise(first, last, mmap.MADV_DONTNEED)


def _maps() -> list[tuple[int, int, str, str]]:
    """First and last address, rights and file of each mapping of this process."""
    if sys.platform != "linux":
        return []
    rows = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return [(*(int(part, 16) for part in row[0].split("-")), row[1], row[5] if len(row) > 5 else "") for row in rows]


def _advise(first: int, last: int, how: int) -> None:
    """Of whole pages in between; advice that the system does not take is no error."""
    page = mmap.PAGESIZE
    first, last = -(-first // page) * page, last // page * page
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(how))
