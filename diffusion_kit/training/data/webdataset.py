"""Training pictures in tar files as webdataset lays them out: members of one sample share the name before its first dot."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from diffusion_kit.training.config import SourceConfig

from .sources import SUFFIXES, Content, Record, size_of
from .tables import captions_of, is_named

IMAGES = tuple(suffix[1:] for suffix in sorted(SUFFIXES))
MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}  # how their files begin

Span = tuple[int, int]  # where a member's bytes are in its tar: offset, length


class Sample(NamedTuple):
    tar: Path
    key: str
    image: Span | None
    condition: Span | None
    text: Span | None
    facts: Span | None


@dataclass(frozen=True)
class Tars:
    """Samples by their number. A tar is opened anew for each: nothing is shared between processes or threads."""

    samples: list[Sample]
    caption: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Record:
        tar, key, *spans = self.samples[index]
        name = f"{tar.name}/{key}"
        try:
            with tar.open("rb") as file:
                image, condition, text, facts = (_bytes(file, span) for span in spans)
        except OSError:
            image = condition = text = facts = None
        told = _json(facts)
        row = told if isinstance(told, dict) else {self.caption: told}
        lines = [line for line in (text or b"").decode(errors="replace").splitlines() if line.strip()]
        return Record(name, image or Path(name), condition, captions_of(lines or row.get(self.caption)), size_of(row))


def open_tars(settings: SourceConfig) -> Tars:
    """The tars of a path; braces as in "{000..009}.tar" name several. Of a damaged one a warning tells, and it is used as
    far as it can be read.

    Raises:
        FileNotFoundError: a tar is not there. ValueError: no pictures. ImportError: braces, without webdataset.
    """
    path = str(Path(settings.path).expanduser())
    samples = [sample for tar in _expanded(path) for sample in _index(tar, settings)]
    if not any(sample.image for sample in samples):
        ends = _extensions(settings, "image", IMAGES, IMAGES)
        raise ValueError(f"{path} has no pictures, which end in .{', .'.join(ends)}: set image=NAME")
    return Tars(samples, settings.caption)


def _expanded(path: str) -> list[Path]:
    if "{" not in path:
        return [Path(path)]
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise ImportError(f'braces in {path} need webdataset: pip install "diffusion_kit[data]"') from None
    return [Path(name) for name in braceexpand(path)]


def _index(tar: Path, settings: SourceConfig) -> Iterator[Sample]:
    """Where the parts of each sample are, in the order of their first members."""
    image = _extensions(settings, "image", IMAGES, IMAGES)
    condition = _extensions(settings, "condition", IMAGES, [f"condition.{end}" for end in IMAGES])
    text = _extensions(settings, "caption", ["txt"], ["txt"])
    for key, members in _members(tar).items():
        yield Sample(tar, key, *(_first(members, names) for names in (image, condition, text, ["json"])))


def _extensions(settings: SourceConfig, field: str, ends: Sequence[str], usual: Sequence[str]) -> list[str]:
    """What a part's member may end in: its name, alone or with the kind of file; without a name, what is usual."""
    name = getattr(settings, field)
    return [name, *(f"{name}.{end}" for end in ends), *(() if is_named(settings, field) else usual)]


def _members(tar: Path) -> dict[str, dict[str, Span]]:
    """Key, extension and place of every plain file."""
    if not tar.is_file():
        raise FileNotFoundError(f"no data {tar.absolute()}")
    found: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isreg() and not member.issparse() and key and extension:
                    place = f"{folder}/{key}" if folder else key
                    found.setdefault(place, {})[extension.lower()] = (member.offset_data, member.size)
            with tar.open("rb") as file:  # tarfile takes a damaged header for the end, which is a block of zeros
                file.seek(opened.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end")
    except tarfile.TarError as error:
        warnings.warn(f"{tar} is damaged ({error}): {len(found)} pictures are used", stacklevel=1)
    return found


def _first(members: Mapping[str, Span], names: Iterable[str]) -> Span | None:
    return next((members[name.lower()] for name in names if name.lower() in members), None)


def _bytes(file: IO[bytes], span: Span | None) -> bytes | None:
    if span is None:
        return None
    file.seek(span[0])
    return file.read(span[1])


def _json(data: bytes | None) -> Any:
    try:
        return json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None


# Writing


class Pair(NamedTuple):
    """A record whose files were read: the name that it gets, and extension and content of each."""

    key: str
    record: Record
    image: tuple[str, bytes]
    condition: tuple[str, bytes] | None


def write_tars(records: Iterable[Record], folder: Path, per_shard: int = 1000) -> list[str]:
    """Tars of `per_shard` pictures in a new folder. Files go in as they are; a caption is a line of KEY.txt.

    Returns:
        A line for each picture that is left out because a file of it cannot be read.

    Raises:
        ValueError: the folder is there already, or no picture is left.
    """
    left_out: list[str] = []
    with new_folder(folder) as place:
        pairs = enumerate(_pairs(((record.name, record) for record in records), left_out))
        for number, shard in itertools.groupby(pairs, lambda pair: pair[0] // per_shard):
            with tarfile.open(place / f"{number:06d}.tar", "w") as tar:
                for _, pair in shard:
                    _add(tar, pair)
        _some(place, left_out)
    return left_out


def _add(tar: tarfile.TarFile, pair: Pair) -> None:
    key, record, (suffix, image), condition = pair
    members = {suffix: image}
    if condition is not None:
        members[f"condition.{condition[0]}"] = condition[1]
    captions = [" ".join(caption.splitlines()) for caption in record.captions if caption.strip()]
    if captions:
        members["txt"] = "\n".join(captions).encode()
    if record.size is not None:
        members["json"] = json.dumps(dict(zip(("width", "height"), record.size, strict=True))).encode()
    for extension, data in members.items():
        header = tarfile.TarInfo(f"{key}.{extension}")  # no time and no owner: the same data are the same file
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))


def import_tars(paths: Sequence[str], folder: Path) -> list[str]:
    """The pictures of tars as files of a new folder, conditions in its folder `conditioning_image`, and metadata.jsonl.

    Returns, Raises: as `write_tars` and `open_tars`.
    """
    left_out: list[str] = []
    sources = [open_tars(SourceConfig(path=path)) for path in paths]
    named = ((tars.samples[k].key, tars[k]) for tars in sources for k in range(len(tars)))
    with new_folder(folder) as place:
        (place / "conditioning_image").mkdir()
        with (place / "metadata.jsonl").open("w") as lines:
            for pair in _pairs(named, left_out):
                lines.write(json.dumps(_put(place, pair)) + "\n")
        _some(place, left_out)
    return left_out


def _put(place: Path, pair: Pair) -> dict[str, Any]:
    """Writes the files of a pair; its line of metadata.jsonl."""
    row: dict[str, Any] = {"image": f"{pair.key}.{pair.image[0]}"}
    (place / row["image"]).write_bytes(pair.image[1])
    if pair.condition is not None:
        row["conditioning_image"] = f"conditioning_image/{pair.key}.{pair.condition[0]}"
        (place / row["conditioning_image"]).write_bytes(pair.condition[1])
    row["text"] = pair.record.captions[0] if len(pair.record.captions) == 1 else list(pair.record.captions)
    return row | (dict(zip(("width", "height"), pair.record.size, strict=True)) if pair.record.size else {})


def _pairs(named: Iterable[tuple[str, Record]], left_out: list[str]) -> Iterator[Pair]:
    taken: dict[str, int] = {}
    for name, record in named:
        try:
            image = _file(record.image)
            condition = None if record.condition is None else _file(record.condition)
        except (OSError, ValueError) as error:
            left_out.append(f"{record.name}: {getattr(error, 'strerror', None) or error}")
        else:
            yield Pair(free_key(name, taken), record, image, condition)


def _file(content: Content) -> tuple[str, bytes]:
    data = content if isinstance(content, bytes) else content.read_bytes()
    suffix = next((suffix for start, suffix in MAGIC.items() if data.startswith(start)), None)
    if suffix is None:
        raise ValueError("not a PNG, JPEG or WEBP image")
    return suffix, data


def free_key(name: str, taken: dict[str, int]) -> str:
    """A name as one part of a path: letters, digits, - and _ only, the end of a long one, with a number if it is taken:
    "a/b.png" becomes "a_b", and then "a_b_2".
    """
    stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
    base = re.sub(r"[^\w-]+", "_", stem)[-50:].strip("_") or "picture"
    key = base
    while key.lower() in taken:  # lower: there are file systems that take A and a for one
        taken[base.lower()] += 1
        key = f"{base}_{taken[base.lower()]}"
    taken[key.lower()] = 1
    return key


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when everything is in it; after an error nothing is left.

    Raises:
        ValueError: the name is taken.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: give a new folder")
    place = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    place.mkdir(parents=True)
    try:
        yield place
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _some(place: Path, left_out: Sequence[str]) -> None:
    if not any(file.suffix == ".tar" or file.suffix in SUFFIXES for file in place.iterdir()):
        raise ValueError(f"no picture can be read: {left_out[0] if left_out else 'there is none'}")
