"""The hash of a model: whether the weights are those with which a picture was made."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from diffusion_kit.models.sources import locate
from diffusion_kit.recipes.whole import write_whole

LARGE = 256_000_000  # bytes; hashes of larger files are remembered, since they take seconds


def fingerprint(source: str | Path) -> str:
    """ "sha256:..." of a .safetensors file, or of a folder's weights and configurations; "commit:..." of a hub id.

    A folder's hash is over the relative paths and the hashes of its files, without the controls that come with it.

    Raises:
        FileNotFoundError: no such model, or a hub id that is not in the cache.
    """
    place = locate(source)
    if isinstance(place, str):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return f"commit:{Path(snapshot_download(place, local_files_only=True)).name}"
        except LocalEntryNotFoundError:
            raise FileNotFoundError(f"{place} is not in the hub's cache") from None
    if place.is_file():
        return f"sha256:{_hash_of(place)}"
    if not any(any(place.glob(name)) for name in ("model_index.json", "config.json", "*.safetensors")):
        raise FileNotFoundError(f"{place} is no model: it has no model_index.json, config.json or .safetensors file")
    found = (file for pattern in ("*.safetensors", "*.json", "*.txt") for file in place.rglob(pattern))
    files = sorted(file for file in found if file.is_file())
    own = [(file.relative_to(place).as_posix(), file) for file in files]
    lines = [f"{name} {_hash_of(file)}\n" for name, file in own if not name.startswith("controls/")]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def short(digest: str) -> str:
    """As much of a hash as tells two apart."""
    return digest[:19]


def _hash_of(file: Path) -> str:
    size, changed = file.stat().st_size, file.stat().st_mtime_ns
    if size < LARGE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    store, key = _store(), f"{file.resolve()} {size} {changed}"
    try:
        known: dict[str, str] = dict(json.loads(store.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    if key not in known:
        with file.open("rb") as stream:
            known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        _remember(store, known)
    return known[key]


def _store() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion_kit" / "hashes.json"


def _remember(store: Path, known: dict[str, str]) -> None:
    """Written beside and renamed; a cache that cannot be written is done without."""
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_whole(store, json.dumps(known).encode())
    except OSError:
        return
