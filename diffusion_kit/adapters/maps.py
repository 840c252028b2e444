"""What control images published adapters expect, known by the adapters' names; and a warning where black is white.

Nearly all adapters for lines were trained on white lines on black, as their model cards say (TencentARC's T2I-Adapters,
lllyasviel's and diffusers' ControlNets); a few on the inverse. Depth is not checked: near is white for all of them, but a
map of the wrong polarity looks like one of the right.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from diffusers import MultiAdapter

from .detectors import detectors
from .pictures import as_list, picture_tensor

Polarity = Literal["white on black", "black on white"]


class ControlMap(NamedTuple):
    """What a control image shows.

    Attributes:
        detector: of the kit, that makes such maps.
        polarity: of maps of lines; None for others.
    """

    detector: str
    polarity: Polarity | None
    shows: str


LINES: Polarity = "white on black"
INVERSE: Polarity = "black on white"

# The first that is found in an adapter's name counts.
KNOWN: tuple[tuple[str, ControlMap], ...] = (
    (r"qr.?code", ControlMap("none", INVERSE, "dark marks on a light ground")),
    (r"anime.colorize", ControlMap("lineart_anime", INVERSE, "lines of a drawing")),
    (r"invert|black.?on.?white|line2line", ControlMap("lineart", INVERSE, "lines")),
    (r"canny", ControlMap("canny", LINES, "edges")),
    (r"scribble|sketch", ControlMap("sketch", LINES, "strokes")),
    (r"line.?art.?anime|anime.?line", ControlMap("lineart_anime", LINES, "lines of a drawing")),
    (r"line.?art|misto.?line|anyline", ControlMap("lineart", LINES, "lines")),
    (r"soft.?edge|(?<![a-z])hed(?![a-z])", ControlMap("hed", LINES, "soft edges")),
    (r"pidi", ControlMap("pidinet", LINES, "soft edges")),
    (r"mlsd", ControlMap("mlsd", LINES, "straight lines")),
    (
        r"open.?pose|key.?pose|(?<![a-z])pose",
        ControlMap("openpose", None, "a skeleton in OpenPose's colours, on black"),
    ),
    (r"depth|zoe|midas", ControlMap("depth", None, "depth, near is white")),
    (r"normal", ControlMap("normal", None, "normals")),
    (r"(?<![a-z])tile", ControlMap("tile", None, "the picture, coarse")),
    (r"blur", ControlMap("blur", None, "the picture, blurred")),
    (r"recolou?r|gr[ae]y", ControlMap("greyscale", None, "the picture in grey")),
    (r"shuffle", ControlMap("shuffle", None, "the picture's colours, warped")),
    (r"colou?r|palette", ControlMap("palette", None, "coarse colours")),
    (r"(?<![a-z])regions?", ControlMap("regions", None, "flat areas of few colours")),
    (r"seg", ControlMap("none", None, "classes in the colours of ADE20K")),
)


def expected_map(name: str) -> ControlMap | None:
    """What an adapter of that name expects; None where the name does not say."""
    last = re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower()
    return next((known for pattern, known in KNOWN if re.search(pattern, last)), None)


def detector_of(name: str) -> str | None:
    """The detector that makes the maps of a control of that name; None where the name does not say."""
    if name in detectors():
        return name
    known = expected_map(name)
    return known.detector if known is not None and known.detector in detectors() else None


def warn_of_polarity(model: Any, image: Any) -> None:
    """Warns of a map of lines that is plainly the inverse of what the adapter expects: more light than dark, or less.

    Args:
        model: a control's network. image: what it is shown; for a MultiAdapter a list, one for each net; for a
            ControlNet-Union a mapping from types.
    """
    multi = isinstance(model, MultiAdapter)
    pairs = zip(model.adapters, as_list(image), strict=False) if multi else [(model, image)]
    named = [(getattr(net, "config", {}).get("_name_or_path", ""), pictures) for net, pictures in pairs]
    for key, pictures in image.items() if isinstance(image, Mapping) else named:
        name = str(key)
        known = expected_map(name)
        if known is None or known.polarity is None:
            continue
        light = picture_tensor(pictures, 64, 64, channels=1).mean().item()
        if (light > 0.65) if known.polarity == LINES else (light < 0.35):
            found = INVERSE if known.polarity == LINES else LINES
            warnings.warn(
                f"{name} expects {known.shows}, {known.polarity}; its control image seems to be {found}: invert it "
                "(detect(..., invert=True), or PIL.ImageOps.invert)",
                stacklevel=2,
            )
