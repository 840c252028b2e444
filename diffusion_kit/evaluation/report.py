"""What an evaluation found: as text, as JSON, and as a page with the pictures side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Figure:
    """A measure's value and the ends of its 95 % interval over conditions, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{_short(self.value)}{interval}"


@dataclass(frozen=True)
class Line:
    """A measure in one arm of the evaluation.

    Attributes:
        arm: "without" the control, "scale 0.5", at the last scale "guidance 2" and "neutral", a picture without content.
        own: against each picture's own condition; for measures of quality the only figure.
        shuffled: the same pictures against the next picture's condition.
        guidance: of the control's own, in that arm.
    """

    measure: str
    larger_is_better: bool
    arm: str
    scale: float
    own: Figure
    shuffled: Figure | None
    guidance: float | None = None


@dataclass(frozen=True)
class Shown:
    """Pictures of one condition that are shown: `made` has the name of an arm, its picture and what was extracted."""

    name: str
    prompt: str
    condition: Image.Image
    made: Sequence[tuple[str, Image.Image, Image.Image | None]]


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        about: what was evaluated: detector, settings, conditions, seeds, steps, guidance.
        lines: measures by arms.
        not_measured: names of measures, and why.
        gallery: the first conditions, with the pictures of their first seed.
    """

    about: Mapping[str, Any]
    lines: Sequence[Line]
    not_measured: Mapping[str, str]
    gallery: Sequence[Shown]

    def table(self) -> str:
        """A block of lines for each measure."""
        text = ["  ".join(f"{key} {value}" for key, value in self.about.items() if value not in ({}, None))]
        for measure in dict.fromkeys(line.measure for line in self.lines):
            own = [line for line in self.lines if line.measure == measure]
            versus = ("own condition", "another's condition") if own[0].shuffled else ("", "")
            better = "more" if own[0].larger_is_better else "less"
            text += ["", f"{f'{measure}, {better} is better':32}{versus[0]:24}{versus[1]}".rstrip()]
            text += [f"  {line.arm:30}{line.own!s:24}{line.shuffled or ''}".rstrip() for line in own]
        text += ["", *(f"{name}: not measured: {reason}" for name, reason in self.not_measured.items())]
        return "\n".join(text).rstrip()

    def to_json(self) -> str:
        lines = [asdict(line) for line in self.lines]
        whole = {"about": dict(self.about), "lines": lines, "not_measured": dict(self.not_measured)}
        return json.dumps(whole, indent=2, default=str) + "\n"

    def page(self, folder: str | Path) -> Path:
        """Writes index.html and its pictures into a folder, which is made if it is not there, and says where."""
        from .page import write

        return write(self, Path(folder))


def _short(value: float | None) -> str:
    """Three digits that count."""
    return f"{value:#.3g}".rstrip(".")
