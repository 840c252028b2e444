"""Files that a command writes: names that are free, and places that can be written, found out before any work."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from diffusion_kit.recipes import Recipe, save

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def output_files(
    out: str | None, names: list[str], *, stem: str = "picture", taken: Collection[Path] = ()
) -> list[Path]:
    """One file for each name.

    Args:
        out: a file, of which a name that is not empty becomes the end ("fox.png", "1" -> "fox-1.png"); or a folder, in
            which every name gets a file of its own; or None for this folder.
        names: ends of the file names; one empty name is a single file.
        taken: files that are spoken for: those that the command reads, or writes otherwise.

    Raises:
        ValueError: a file that is taken, no such folder, a format that is not written, a place that cannot be written.
    """
    path = Path(out) if out else Path(f"{stem}.png")
    if is_chosen(out):
        return writable(free_files(path / f"{stem}.png" if path.is_dir() else path, names, taken))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {path} must end in .png, .jpg or .webp, or be a folder")
    files = [_named(path, name) for name in names]
    spoken_for = {file.resolve() for file in taken}
    if met := next((file for file in files if file.resolve() in spoken_for), None):
        raise ValueError(f"--out {met} is a file that this command reads, or writes otherwise: give another name")
    return writable(files)


def is_chosen(out: str | None) -> bool:
    """Whether `--out` leaves it to the command how files are called: then none that is there is written over."""
    return out is None or Path(out).is_dir()


def saved(
    picture: Image.Image, file: Path, recipe: Recipe | None = None, *, chosen: bool, taken: Collection[Path] = ()
) -> Path:
    """Writes a picture; where to: a name that was `chosen` because it was free may be another process's by now, and then
    one is chosen that is not `taken`, either."""
    place = file
    while True:
        try:
            save(picture, place, recipe, new=chosen)
            return place
        except FileExistsError:
            (place,) = free_files(file, [""], taken)


def output_folder(out: str | None) -> Path:
    """A folder to write to, made if its parent is there.

    Raises:
        ValueError: it is a file, or cannot be made.
    """
    folder = Path(out or ".")
    if not folder.exists() and folder.suffix.lower() in SUFFIXES:
        raise ValueError(f"--out {folder} is the name of a picture; of several pictures it must be a folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; of several pictures it must be a folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def _named(path: Path, name: str) -> Path:
    return path.with_stem(f"{path.stem}-{name}") if name else path


def free_files(path: Path, names: list[str], taken: Collection[Path] = ()) -> list[Path]:
    """A file for each name, with the first number behind the path's own name under which none of them stands yet."""
    attempt, number = path, 1
    while any(os.path.lexists(file) or file in taken for file in [attempt, *(_named(attempt, name) for name in names)]):
        number += 1
        attempt = path.with_stem(f"{path.stem}_{number}")
    return [_named(attempt, name) for name in names]


def writable(files: list[Path]) -> list[Path]:
    """The files, after a file was written and removed in each of their folders: permissions alone do not tell."""
    for folder in {file.parent for file in files}:
        if not folder.is_dir():
            raise ValueError(f"--out: there is no folder {folder}")
        trial = folder / f".diffusion-kit-{os.getpid()}"
        try:
            trial.write_bytes(b"")
        except OSError as error:
            raise ValueError(f"--out: the folder {folder} cannot be written to: {error.strerror}") from None
        finally:
            trial.unlink(missing_ok=True)
    for file in files:
        if file.is_dir():
            raise ValueError(f"--out {file} is a folder")
    return files
