"""Models and controls that may be picked: those that come along, and those in the folders that the studio was told of.

Nothing else is loaded, whatever a request names: a request must not read files of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusion_kit.models.formats import identify
from diffusion_kit.models.sources import EMBEDDED, read_json

CONTROLS = ("controlnet", "controlnet_union", "control_lora", "t2i_adapter", "ip_adapter")  # kinds of files
CLASSES = ("ControlNetModel", "ControlNetUnionModel", "T2IAdapter", "MultiAdapter")


@dataclass(frozen=True)
class Library:
    """
    Args:
        models, controls: folders to look into, folders and files that are one themselves; of models also hub ids.
    """

    models: tuple[str, ...]
    controls: tuple[str, ...]

    def find_models(self) -> dict[str, str]:
        """Label -> source, as the folders are now; those that come along at the end."""
        found: dict[str, str] = {}
        for place in self.models:
            if place in EMBEDDED or not Path(place).exists():
                found[place] = place
            else:
                _label(found, _models_in(Path(place).absolute()))
        return found | {name: name for name in EMBEDDED if name not in found}

    @property
    def first(self) -> str:
        """Label of the model that is taken where none is named."""
        return next(iter(self.find_models()))

    def find_controls(self) -> dict[str, str]:
        """Label -> source of the controls that do not come with a model."""
        found: dict[str, str] = {}
        _label(found, (own for place in self.controls for own in _controls_in(Path(place).absolute())))
        return found

    def label(self, source: str) -> str | None:
        """Of a model by its source; None where it is not in the library."""
        return next((label for label, own in self.find_models().items() if own == source), None)

    def model(self, name: str) -> str:
        """The source of a model by its label, or by itself.

        Raises:
            ValueError: it is not in the library.
        """
        return _picked(name, self.find_models(), "model", "--models")

    def control(self, name: str, own: Iterable[str]) -> str:
        """The same of a control; `own` are the names of those that come with the model."""
        return _picked(name, {name: name for name in own} | self.find_controls(), "control", "--controls")


def _picked(name: str, found: dict[str, str], what: str, option: str) -> str:
    if name in found:
        return found[name]
    if name in found.values():
        return name
    raise ValueError(f"no {what} {name!r} here; there are {', '.join(found)}: {option} adds folders")


def _label(found: dict[str, str], places: Iterable[Path]) -> None:
    """Adds places by their names; of those with the same name, later ones with their folders' before it."""
    for place in places:
        label, above = place.stem if place.is_file() else place.name, place.parent
        while label in found and found[label] != str(place) and above.name:
            label, above = f"{above.name}/{label}", above.parent
        found[label] = str(place)


def _models_in(place: Path) -> Iterator[Path]:
    if _is_model(place):
        yield place
    elif place.is_dir():
        yield from (own for own in sorted(place.iterdir()) if _is_model(own))


def _is_model(place: Path) -> bool:
    return (place / "model_index.json").is_file() if place.is_dir() else _kind(place) == "checkpoint"


def _controls_in(place: Path) -> Iterator[Path]:
    if _is_control(place):
        yield place
    elif place.is_dir():
        yield from (own for own in sorted(place.iterdir()) if _is_control(own))


def _is_control(place: Path) -> bool:
    if place.is_file():
        return _kind(place) in CONTROLS
    if (place / "config.json").is_file():
        try:
            return read_json(place / "config.json", "control").get("_class_name") in CLASSES
        except ValueError:
            return False
    return place.is_dir() and any(_kind(file) in CONTROLS for file in place.glob("*.safetensors"))


def _kind(file: Path) -> str | None:
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        return identify(file).kind
    except (ValueError, OSError):  # cut short, or of somebody else
        return None
