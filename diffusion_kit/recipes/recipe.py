"""`Recipe`: everything that a picture depends on, as a value and as JSON.

The JSON is one object with the fields of `Recipe` and a "format" number, in ASCII. Embedded files are base64. It is JSON
as Python writes it: schedulers have settings of -Infinity. NaN is refused, since nothing is equal to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

FORMAT = 1
LARGEST = 1_000_000_000  # bytes of a picture's file
# Fields that format 1 had not at first: they are written where they are set, so that other recipes keep their text.
LATER = ("low_memory",)


@dataclass(frozen=True)
class FileRef:
    """A picture that went into a run.

    Attributes:
        path: as the user wrote it.
        sha256: of the file's bytes, in hexadecimal.
        data: the whole file, where it is embedded.
    """

    path: str
    sha256: str
    data: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, path: str | Path, *, embed: bool = False) -> FileRef:
        """The file as it is now.

        Raises:
            FileNotFoundError: no such file. ValueError: it is a folder, a pipe or a device.
        """
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(f"no file {path}")
        if not file.is_file():
            raise ValueError(f"{path} is no regular file")
        if embed:
            data = file.read_bytes()
            return cls(str(path), hashlib.sha256(data).hexdigest(), data)
        with file.open("rb") as stream:  # in pieces: a file of many gigabytes can be named too
            return cls(str(path), hashlib.file_digest(stream, "sha256").hexdigest())

    def open(self) -> bytes:
        """The file's bytes: the embedded ones, else those at `path` if they are still the same.

        Raises:
            ValueError: the file is not there or cannot be read, or has changed.
        """
        if self.data is not None:
            return self.data
        try:
            if not Path(self.path).is_file():
                raise self._lost("is not there any more")
            if Path(self.path).stat().st_size > LARGEST:
                raise self._lost(f"is larger than a picture may be ({LARGEST // 10**6} MB)")
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise self._lost(f"cannot be read ({error.strerror})") from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise self._lost(f"has changed since (sha256 was {_short(self.sha256)}, is {_short(found)})")
        return data

    def _lost(self, how: str) -> ValueError:
        return ValueError(
            f"the picture was made with {printable(f'{self.path}, which {how}')}; "
            "give it again with its option, or make pictures with --embed-controls"
        )

    def __str__(self) -> str:
        return f"{self.path} (sha256 {_short(self.sha256)}{', embedded' if self.data is not None else ''})"


@dataclass(frozen=True)
class ControlRecipe:
    """A control of a run; `scale` to `mode`, `guidance` and `background` are those of `diffusion_kit.Control`.

    Attributes:
        kind: name, path or hub id of the control's network, as given.
        image: the picture that was given, before any detector.
        hash: of the network.
        type: what the picture shows, for a ControlNet-Union; None: what the detector makes.
        detect: the detector that made the control image from `image` ("canny", "depth:MODEL"); None for none.
    """

    kind: str
    image: FileRef
    hash: str | None = None
    detect: str | None = None
    scale: float | tuple[float, ...] = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    mask: FileRef | None = None
    guidance: float | None = None
    background: float = 0.0
    type: str | None = None

    def __str__(self) -> str:
        detector = f", through {self.detect}" if self.detect else ""
        mask = f"\nmask {self.mask}" if self.mask else ""
        guidance = "" if self.guidance is None else f", guidance {self.guidance}"
        return (
            f"{_with_hash(self.kind, self.hash)}\nimage {self.image}{detector}{mask}\n"
            f"scale {self.scale}, from {self.start} to {self.end}, mode {self.mode}{guidance}"
        )


@dataclass(frozen=True)
class Recipe:
    """What a picture was made from; the same recipe on the same machine makes the same picture.

    Attributes:
        model: as given: "default", a folder, a file or a hub id.
        scheduler: name of its class; `scheduler_config` are its settings.
        strength, image, mask: of image-to-image and inpainting.
        fit: how pictures of another shape were brought to the output's.
        optimize, engine: the level of `pipe.optimize` and what executed the networks; None: they ran as they are.
        low_memory: of `pipe.optimize`; large pictures went through the autoencoder in tiles.
        versions: package to version.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    model: str
    model_hash: str | None
    scheduler: str
    scheduler_config: Mapping[str, Any]
    strength: float | None = None
    image: FileRef | None = None
    mask: FileRef | None = None
    controls: tuple[ControlRecipe, ...] = ()
    fit: str = "cover"
    dtype: str = "float32"
    device: str = "cpu"
    optimize: str | None = None
    engine: str | None = None
    low_memory: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """diffusers' notes to itself are no settings, and some of them are in another order in each process."""
        own = {key: value for key, value in self.scheduler_config.items() if not key.startswith("_")}
        object.__setattr__(self, "scheduler_config", own)

    def to_json(self) -> str:
        """
        Raises:
            ValueError: a value that `from_json` would refuse. TypeError: one that JSON has no form for.
        """
        own = {name: value for name, value in vars(self).items() if value or name not in LATER}
        text = json.dumps({"format": FORMAT, **own}, default=_encode)
        Recipe.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Fields that are not known are ignored.

        Raises:
            ValueError: no JSON, a newer format, a field that is missing or of the wrong type, NaN.
        """
        try:
            content = json.loads(text, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"recipe is broken: {error}") from None
        if not isinstance(content, dict) or type(number := content.get("format")) is not int:
            raise ValueError("recipe is broken: it is no JSON object with a format number")
        if number != FORMAT:
            raise ValueError(
                f"recipe has format {_excerpt(number)}; this diffusion-kit reads format {FORMAT}: update it"
            )
        recipe: Recipe = _decode(cls, content, "recipe")
        return recipe

    def describe(self) -> str:
        """Aligned lines to read; hashes are cut to 12 letters."""
        settings = [f"{key}={value}" for key, value in self.scheduler_config.items()]
        return table(
            [
                ("prompt", self.prompt),
                ("negative prompt", self.negative_prompt),
                ("seed", self.seed),
                ("steps", self.steps),
                ("guidance scale", self.guidance_scale),
                ("size", f"{self.width} x {self.height}"),
                ("model", _with_hash(self.model, self.model_hash)),
                ("scheduler", "\n".join([self.scheduler, *textwrap.wrap(", ".join(settings), 100)])),
                ("image", self.image),
                ("mask", self.mask),
                ("strength", self.strength),
                *(("control", control) for control in self.controls),
                ("fit", self.fit if self.image or self.controls else None),
                ("computed in", f"{self.dtype} on {self.device}"),
                ("optimized", None if self.optimize is None else f"{self.optimize}, engine {self.engine}"),
                ("low memory", "yes" if self.low_memory else None),
                ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items()) or None),
            ]
        )


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Labels in one column, values in the next, line breaks kept inside it; rows of None are left out."""
    shown = [(label, str(value).split("\n")) for label, value in rows if value is not None]
    width = 2 + max((len(label) for label, _ in shown), default=0)
    lines = [
        f"{'' if k else label:{width}}{printable(line)}" for label, values in shown for k, line in enumerate(values)
    ]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor, or that it could not show, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(digest: str) -> str:
    kind, colon, letters = digest.rpartition(":")
    return kind + colon + (letters if len(letters) <= 12 else f"{letters[:12]}…")


def _with_hash(name: str, digest: str | None) -> str:
    return f"{name} (hash {_short(digest)})" if digest else name


def _encode(value: Any) -> Any:
    """What `json` does not know: our own values, and the mappings and arrays of a scheduler's settings."""
    if is_dataclass(value):
        return vars(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a recipe cannot hold {type(value).__name__} {value!r}")


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value of a recipe")
    return float(name)


_FORMS: dict[Any, tuple[tuple[type, ...], str]] = {  # hint -> what JSON has for it, and its name in errors
    str: ((str,), "text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    bytes: ((str,), "base64"),
    tuple: ((list,), "a list"),
    Mapping: ((dict,), "an object"),
    NoneType: ((NoneType,), "null"),
}


def _decode(hint: Any, value: Any, name: str) -> Any:
    """The value in the type of the hint: a dataclass or one of `_FORMS`, or a union of such with different forms.

    Raises:
        ValueError: `name`, what stands there, and what should.
    """
    if hint is Any:
        return value
    expected = []
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        types, form = _FORMS[Mapping if is_dataclass(option) else get_origin(option) or option]
        if type(value) in types:  # not isinstance: True is no number
            return _build(option, value, name)
        expected.append(form)
    raise ValueError(f"{name} is {_excerpt(value)}; it must be {' or '.join(expected)}")


def _build(hint: Any, value: Any, name: str) -> Any:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(kind):
        return _instance(kind, value, name)
    if kind is tuple:
        return tuple(_decode(arguments[0], item, f"{name}[{k}]") for k, item in enumerate(value))
    if kind is Mapping:
        return {key: _decode(arguments[1], item, f"an entry of {name}") for key, item in value.items()}
    if kind is bytes:
        try:
            return base64.b64decode(value, validate=True)
        except ValueError:
            raise ValueError(f"{name} is no base64") from None
    if (kind is int and not 0 <= value < 2**64) or (kind is float and not abs(value) <= sys.float_info.max):
        raise ValueError(f"{name} is {_excerpt(value)}, which is out of range")
    return float(value) if kind is float else value


def _instance(cls: Any, values: dict[str, Any], name: str) -> Any:
    hints, known = get_type_hints(cls), {}
    for each in fields(cls):
        if each.name in values:
            known[each.name] = _decode(hints[each.name], values[each.name], f"{name}.{each.name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{name} has no {each.name}")
    return cls(**known)


def _excerpt(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}…"
