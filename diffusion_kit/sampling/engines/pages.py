"""Gives memory back that is a copy of a file's pages: who looks at it again reads the file. On Linux; elsewhere nothing."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PAGEMAP = Path("/proc/self/pagemap")  # 8 bytes a page
IN_MEMORY, SWAPPED, OF_A_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)  # bits of an entry
PAGEOUT = 21  # of madvise since Linux 5.4: changed pages are not lost, they stay or are swapped
EVERY = 0.05  # seconds
WEIGHTS = 2**30  # bytes of what is mapped to write and holds weights, not a library's variables


def page_out(nets: Iterable[nn.Module]) -> None:
    """Weights that lie in a file (see `weights.park`): their pages leave memory, changed ones are kept."""
    if sys.platform != "linux":
        return
    pages = FilePages()
    for parameter in _in_memory(nets):
        if pages.hold(parameter):
            _advise(parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, PAGEOUT)


def forget(nets: Iterable[nn.Module]) -> None:
    """Of all weights that lie in files: see `FilePages`."""
    pages = FilePages()
    for parameter in _in_memory(nets):
        pages.forget(parameter)


def _in_memory(nets: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Weights that have memory of their own: not those of an accelerator, nor quantised ones, which are made of others."""
    for parameter in (parameter for net in nets for parameter in net.parameters()):
        if parameter.device.type == "cpu" and not is_traceable_wrapper_subclass(parameter):
            yield parameter


class FilePages:
    """The files that lie in this process's memory, as they are now. Made when it is first asked for."""

    def __init__(self) -> None:
        self._mapped: list[tuple[int, int]] | None = None

    def forget(self, tensor: Tensor) -> None:
        """Pages of a file in which the tensor lies leave memory; whoever looks at them reads the file again. Those that
        were changed since they were read stay."""
        if self.hold(tensor):
            start = tensor.data_ptr()
            for first, last in _unchanged(start, start + tensor.nbytes):
                _advise(first, last, mmap.MADV_DONTNEED)

    def hold(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in a file."""
        if self._mapped is None:
            self._mapped = sorted((first, last) for first, last, _, path in _maps() if path.startswith("/"))
        start = tensor.data_ptr()
        k = bisect_right(self._mapped, (start, sys.maxsize)) - 1
        return k >= 0 and start < self._mapped[k][1]

    def hold_unchanged(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in a file and is as it is there."""
        if not self.hold(tensor):
            return False
        page, start = mmap.PAGESIZE, tensor.data_ptr()
        entries = _entries(start // page, -(-(start + tensor.nbytes) // page))
        return entries is not None and not _changed(entries).any()


def _unchanged(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs of whole pages in memory that are as in their file."""
    page = mmap.PAGESIZE
    start = -(-first // page)
    entries = _entries(start, last // page)
    if entries is None:
        return
    own = np.concatenate([[0], (entries & (IN_MEMORY | OF_A_FILE)) == (IN_MEMORY | OF_A_FILE), [0]]).astype(np.int8)
    turns = np.diff(own)
    for begin, end in zip(np.flatnonzero(turns == 1), np.flatnonzero(turns == -1), strict=True):
        yield (start + int(begin)) * page, (start + int(end)) * page


def _changed(entries: Any) -> Any:
    """Of pages of a file those that this process has written to: they are its own, in memory or swapped."""
    there = (entries & (IN_MEMORY | SWAPPED)) != 0
    return there & ((entries & OF_A_FILE) == 0)


def _entries(first: int, last: int) -> Any:
    """What the system says of pages by their number: an array, or None on another system or where it is hidden."""
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(8 * first)
            return np.frombuffer(file.read(8 * max(0, last - first)), np.uint64)
    except OSError:
        return None


@contextmanager
def without_pages_of(file: Path) -> Iterator[None]:
    """Meanwhile and afterwards pages of a file that somebody maps to read are given back again and again."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            forget_pages_of(file)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        forget_pages_of(file)


def forget_pages_of(place: Path) -> None:
    """Pages of a file, or of those in a folder, that somebody maps to read leave memory; changed ones stay, as a library's
    are to which its loader wrote. Weights that AOTInductor appends to a library, from 2 GB on, are mapped to write, and
    only read."""
    place = place.resolve()
    for first, last, rights, path in _maps():
        if ("w" not in rights or last - first >= WEIGHTS) and Path(path).is_relative_to(place):
            for run in _unchanged(first, last):
                _advise(*run, mmap.MADV_DONTNEED)


def _maps() -> list[tuple[int, int, str, str]]:
    """First and last address, rights and file of each mapping of this process."""
    if sys.platform != "linux":
        return []
    rows = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return [(*(int(part, 16) for part in row[0].split("-")), row[1], row[5] if len(row) > 5 else "") for row in rows]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _advise(first: int, last: int, how: int) -> None:
    """Of whole pages in between; advice that the system does not take is no error."""
    page = mmap.PAGESIZE
    first, last = -(-first // page) * page, last // page * page
    if first < last:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(how))
