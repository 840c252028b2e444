"""Tensors by key in safetensors shards of a folder. Shards are written whole and renamed and never change, so any number of
processes may write and read at once; of what two of them wrote the shard whose name comes first counts, for everybody."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_kit.training.checkpoints import sync

SHARD = 64 * 2**20  # bytes that are kept before a shard is written
ABANDONED = 24 * 3600  # seconds after which nobody writes a shard any more
SEPARATOR = "/"  # between a key and the name of one of its tensors


class Store:
    """
    Args:
        folder: of the shards, made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.part"):  # by a process that was killed
            with suppress(FileNotFoundError):  # another writer's, which it renames at this moment
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        self._places: dict[str, tuple[Path, list[str]]] = {}
        self._known: set[Path] = set()
        self._open: dict[Path, Any] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._bytes = 0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._kept

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in the process that opened them."""
        return {**vars(self), "_open": {}}

    def refresh(self) -> None:
        """Reads the headers of shards that are new. A damaged shard counts as missing."""
        for shard in sorted(set(self.folder.glob("*.safetensors")) - self._known):
            self._known.add(shard)
            try:
                with safe_open(shard, "pt") as tensors:
                    names = list(tensors.keys())
            except (SafetensorError, OSError):
                continue
            found: dict[str, list[str]] = {}
            for full in names:
                key, _, name = full.rpartition(SEPARATOR)
                if self._places.get(key, (shard,))[0] >= shard:
                    found.setdefault(key, []).append(name)
            self._places |= {key: (shard, own) for key, own in found.items()}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, mapped from the file, or None."""
        if key not in self._places:
            return None
        shard, names = self._places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, "pt").__enter__()
        return {name: self._open[shard].get_tensor(f"{key}{SEPARATOR}{name}") for name in names}

    def put(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps the tensors of keys until there are enough for a shard; `flush` writes the rest. Those of one call come
        into one shard, all or none, whatever ends the process; a key that is there stays as it is."""
        new = {
            key: {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            for key, tensors in entries.items()
            if key not in self
        }
        self._kept.update(new)
        self._bytes += sum(value.nbytes for tensors in new.values() for value in tensors.values())
        if self._bytes >= SHARD:
            self.flush()

    def flush(self) -> None:
        if not self._kept:
            return
        name = uuid.uuid4().hex
        beside = self.folder / f".{name}.part"
        try:
            save_file(
                {f"{key}{SEPARATOR}{name}": value for key, own in self._kept.items() for name, value in own.items()},
                beside,
            )
            sync(beside)
            os.replace(beside, self.folder / f"{name}.safetensors")
        finally:
            beside.unlink(missing_ok=True)
        self._kept, self._bytes = {}, 0
        self.refresh()
