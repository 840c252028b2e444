"""Pictures on the page: given, painted on, and found again."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import numpy as np
from PIL import Image

from diffusion_kit.adapters.pictures import load_image
from diffusion_kit.recipes import FileRef
from diffusion_kit.studio.core import Core

HERE = Path(__file__).parent
Strokes = Literal["region", "either", "sketch"]
HINTS = {
    "region": "drop, paste or upload a picture",
    "either": "drop, paste or upload a picture, or draw one",
    "sketch": "draw, or drop, paste or upload a sketch",
}
NOTHING = json.dumps({"picture": "", "mask": ""})  # of an easel that was emptied: the browser finds none of before
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}  # by their first bytes


def easel(label: str, height: int, elem_id: str, strokes: Strokes = "either") -> Any:
    """A picture that is painted on; what is given and painted stays in the browser, so that a reload finds it. Its value is
    JSON: the picture as a data URL with its own bytes, and what is painted as a PNG that is opaque there; empty where there
    is no picture. Its event `input` comes when the pen lifts. (Gradio's own editor packs and sends all its layers at every
    event of the page.)

    Args:
        strokes: a region of a picture; either that or, on an empty field, a picture, black on white; always a sketch.
    """
    told, css, js = ((HERE / f"easel.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    words = {"LABEL": label, "HINT": HINTS[strokes], "HEIGHT": f"{height}", "NAME": elem_id, "STROKES": strokes}
    for name, text in words.items():
        told = told.replace(name, html.escape(text))
    return gr.HTML("", html_template=told, css_template=css, js_on_load=js, elem_id=elem_id)


def layers(value: str | None, name: str) -> tuple[str, str]:
    """Picture and paint of an easel, each as a data URL, or empty.

    Raises:
        ValueError: it is no easel's value.
    """
    if not value:
        return "", ""
    try:
        own = json.loads(value)
        return str(own["picture"]), str(own.get("mask") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{name} is no picture") from None


def drawing(core: Core, value: str | None, name: str) -> Image.Image | None:
    """The picture of an easel, which is kept nowhere; None where there is none.

    Raises:
        ValueError: it cannot be used, in one line.
    """
    picture, _ = layers(value, name)
    return load_image(core.inputs.decoded(picture, name), name=name) if picture else None


def drawn(core: Core, value: str | None, name: str) -> tuple[FileRef | None, FileRef | None]:
    """Keeps the picture of an easel, and what is painted on it, white there; None where there is nothing.

    Raises:
        ValueError: it cannot be used, in one line.
    """
    picture, paint = layers(value, name)
    if not picture:
        return None, None
    image = core.inputs.add_base64(picture, name)
    if not paint:
        return image, None
    data = core.inputs.decoded(paint, name)
    load_image(data, name=name)  # which is safe to open
    with Image.open(io.BytesIO(data)) as layer:
        mask = np.asarray(layer.convert("RGBA"))[..., 3] > 127
    return image, core.inputs.add_picture(Image.fromarray(mask.astype(np.uint8) * 255), name) if mask.any() else None


def repainted(core: Core, picture: FileRef | None, mask: FileRef | None, name: str, gone: list[str]) -> str:
    """The value of an easel that shows a recipe's picture, and its mask as what is painted; `NOTHING` without the picture.

    Args:
        gone: to which is added what is not to be had.
    """
    image, region = found(core, picture), found(core, mask)
    gone += [f"the picture {name}"] if picture is not None and image is None else []
    gone += [f"the region {name}"] if mask is not None and (region is None or image is None) else []
    return NOTHING if image is None else painted(image, None if region is None else load_image(region))


def painted(picture: bytes, mask: Image.Image | None = None) -> str:
    """An easel's value."""
    paint = ""
    if mask is not None:
        layer = Image.new("RGBA", mask.size, "#e0245e")
        layer.putalpha(mask.convert("L").point(lambda value: 255 * (value > 127)))
        data = io.BytesIO()
        layer.save(data, "PNG")
        paint = url_of(data.getvalue())
    return json.dumps({"picture": url_of(picture), "mask": paint})


def url_of(picture: bytes) -> str:
    kind = next((own for start, own in KINDS.items() if picture.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def found(core: Core, ref: FileRef | None) -> bytes | None:
    """A recipe's picture, if it may be read: one of the studio's own, or any where there is one user, at the machine."""
    if ref is None or (ref.data is None and not core.config.is_own(ref.path) and core.config.is_shared):
        return None
    try:
        return ref.open()
    except ValueError:  # moved or changed since
        return None
