"""What is wrong with training data, found before a training: every picture is opened once."""

from __future__ import annotations

import hashlib
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from diffusion_kit.adapters.detectors import check_options, detect, detector, missing
from diffusion_kit.adapters.pictures import eight_bit, fit_image, load_image, resize
from diffusion_kit.training.config import ConditionConfig, DataConfig

from .samples import ASPECT, opened
from .sources import Content, Record, Source, open_source

NOTES = ("small", "other size")  # kinds that a training can do with
SIDE, COLUMNS, LINE = 160, 4, 14  # pixels of a picture in the contact sheet, pairs in a row, height of a line of text


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        kind: "damaged" (a tar), "unreadable", "wrong size", "no condition", "other shape", "no caption", "duplicate" and
            "detector" are problems; "small" and "other size" are notes.
        picture: the record's name; empty if it is about all.
    """

    kind: str
    picture: str
    text: str

    @property
    def problem(self) -> bool:
        return self.kind not in NOTES


@dataclass(frozen=True)
class Findings:
    """
    Attributes:
        pictures: how many records there are.
        readable: source and number of those that can be opened.
    """

    pictures: int
    found: tuple[Finding, ...]
    readable: tuple[tuple[Source, int], ...]

    @property
    def problems(self) -> int:
        return sum(finding.problem for finding in self.found)


@dataclass(frozen=True)
class Look:
    """What was seen of a record; `digest` is of its pixels, None where it cannot be opened."""

    name: str
    found: list[Finding]
    digest: bytes | None = None
    conditioned: bool = False
    captioned: bool = False


def check(data: DataConfig, *, conditions: bool = True, captions: bool = True) -> Findings:
    """Opens every picture, and every condition where no detector makes it.

    Args:
        conditions, captions: whether the training needs them.

    Raises:
        FileNotFoundError, ValueError, TypeError: no source, one that cannot be opened at all, no such detector or option.
    """
    if not data.sources:
        raise ValueError("data.sources is empty: name at least one, such as data.sources=[{path: pictures}]")
    given = conditions and data.condition.detector is None
    found = list(_detector(data.condition))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sources = [open_source(source) for source in data.sources]
    found += [Finding("damaged", "", str(line.message)) for line in told if line.category is UserWarning]
    places = [(source, number) for source in sources for number in range(len(source))]
    with ThreadPool(max(1, data.workers)) as pool:
        looking = pool.imap(partial(_look, data=data, given=given), places)
        looks = list(tqdm(looking, total=len(places), unit="picture", disable=None))
    found += [finding for look in looks for finding in look.found]
    found += _duplicates(looks)
    if given:
        line = "no picture has a condition image, and data.condition.detector is not set"
        found += _lacking("no condition", looks, [look.conditioned for look in looks], line)
    if captions:
        found += _lacking("no caption", looks, [look.captioned for look in looks], "no picture has a caption")
    readable = tuple(place for place, look in zip(places, looks, strict=True) if look.digest)
    return Findings(len(places), tuple(found), readable)


def _detector(own: ConditionConfig) -> Iterator[Finding]:
    if own.detector is not None:
        check_options(own.detector, detector(own.detector), own.options)
        if lack := missing(own.detector, own.options.get("model")):
            yield Finding("detector", "", lack)


def _look(place: tuple[Source, int], data: DataConfig, given: bool) -> Look:
    source, number = place
    record = source[number]
    conditioned, captioned = record.condition is not None, all(caption.strip() for caption in record.captions)
    try:
        picture = opened(record.image, record.name)
    except (ValueError, OSError) as error:
        return Look(record.name, [Finding("unreadable", record.name, str(error))], None, conditioned, captioned)
    found = [Finding(kind, record.name, text) for kind, text in _sizes(record, picture, data)]
    if given and record.condition is not None:
        found += [Finding(kind, record.name, text) for kind, text in _condition(record, record.condition, picture)]
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).digest()
    return Look(record.name, found, digest, conditioned, captioned)


def _sizes(record: Record, picture: Image.Image, data: DataConfig) -> Iterator[tuple[str, str]]:
    width, height = picture.size
    if record.size is not None and record.size != picture.size:
        yield "wrong size", "its size is told as {} x {}, it is {} x {}".format(*record.size, width, height)
    if (width * height < data.resolution**2) if data.buckets else (min(picture.size) < data.resolution):
        yield "small", f"{width} x {height} is enlarged for the resolution {data.resolution}"


def _condition(record: Record, content: Content, picture: Image.Image) -> Iterator[tuple[str, str]]:
    try:
        condition = opened(content, f"the condition of {record.name}")
    except (ValueError, OSError) as error:
        yield "unreadable", str(error)
        return
    if condition.size != picture.size:
        aspect = condition.width / condition.height * picture.height / picture.width
        sizes = "the condition is {} x {}, the picture {} x {}".format(*condition.size, *picture.size)
        yield "other shape" if abs(np.log(aspect)) > ASPECT else "other size", sizes


def _duplicates(looks: Sequence[Look]) -> Iterator[Finding]:
    first: dict[bytes, Look] = {}
    for look in looks:
        if look.digest is not None and (before := first.setdefault(look.digest, look)) is not look:
            yield Finding("duplicate", look.name, f"the same pixels as {before.name}")


def _lacking(kind: str, looks: Sequence[Look], have: Sequence[bool], nobody: str) -> Iterator[Finding]:
    """A finding for each without; one for all where nobody has."""
    if not any(have):
        yield Finding(kind, "", nobody)
        return
    for look, has in zip(looks, have, strict=True):
        if not has:
            yield Finding(kind, look.name, f"it has {kind}, others have one")


def contact_sheet(findings: Findings, data: DataConfig, most: int = 32) -> Image.Image:
    """Pictures from all over the data, beside each its condition as it came or as the detector makes it, below a caption.

    Raises:
        ValueError: no picture can be opened. FileNotFoundError: the detector's weights are missing.
    """
    places = findings.readable
    if not places:
        raise ValueError("no picture can be opened")
    shown = [places[k * len(places) // most] for k in range(most)] if len(places) > most else places
    rows = -(-len(shown) // COLUMNS)
    cell = 2 * SIDE + 8, SIDE + 2 * LINE + 8
    sheet = Image.new("RGB", (COLUMNS * cell[0], rows * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for k, (source, number) in enumerate(tqdm(shown, unit="picture", disable=None)):
        left, top = k % COLUMNS * cell[0], k // COLUMNS * cell[1]
        record = source[number]
        picture = eight_bit(opened(record.image, record.name))
        for offset, tile in enumerate((picture, _condition_of(record, picture, data))):
            if tile is not None:
                sheet.paste(fit_image(eight_bit(tile), SIDE, SIDE, "contain"), (left + offset * SIDE, top))
        lines = textwrap.wrap(record.captions[0], SIDE // 3, max_lines=2)
        draw.multiline_text((left, top + SIDE), "\n".join(lines), "black", font, spacing=2)
    return sheet


def _condition_of(record: Record, picture: Image.Image, data: DataConfig) -> Image.Image | None:
    """None where there is none, or none that can be opened or made."""
    own = data.condition
    try:
        if own.detector is not None:
            scale = data.resolution / min(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
            return detect(own.detector, resize(picture, (width, height)), **own.options)
        return None if record.condition is None else load_image(record.condition)
    except ValueError:
        return None
