"""Pictures on the page: given, painted on, and found again."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffusion_kit.adapters.pictures import load_image
from diffusion_kit.recipes import FileRef
from diffusion_kit.studio.core import Core

HERE = Path(__file__).parent
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}  # by their first bytes


def given(label: str, elem_id: str) -> Any:
    """A picture that is not painted on; its value is the file as the user gave it, which gradio does not open."""
    part: Any = gr.Image(label=label, type="filepath", image_mode=None, format="png", height=220, elem_id=elem_id)
    part.preprocess = partial(safely, part.preprocess)
    return part


def safely(preprocess: Callable[[Any], Any], file: Any) -> Any:
    """
    Raises:
        gr.Error: no picture that the kit opens, in one line.
    """
    if file is not None:
        try:
            load_image(file.path, name="the picture")
        except ValueError as error:
            raise gr.Error(str(error), title="not like this", print_exception=False) from None
    return preprocess(file)


def kept(core: Core, file: str, name: str) -> FileRef:
    """Keeps a picture that was given, with the bytes that the user gave.

    Raises:
        ValueError: it cannot be used, in one line.
    """
    return core.inputs.add(Path(file).read_bytes(), name)


def easel(label: str, height: int, elem_id: str, *, sketches: bool = True) -> Any:
    """A picture that is painted on. Its value is JSON: the picture as a data URL with its own bytes, and what is
    painted as a PNG that is opaque there; empty where there is no picture. (Gradio's own editor packs and sends all its
    layers at every event of the page.)

    Args:
        sketches: whether strokes on an empty field are a picture, black on white.
    """
    told, css, js = ((HERE / f"easel.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    hint = "drop, paste or upload a picture" + (", or draw one" if sketches else "")
    words = {"LABEL": label, "HINT": hint, "HEIGHT": f"{height}", "SKETCHES": str(sketches).lower()}
    for name, text in words.items():
        told = told.replace(name, html.escape(text))
    return gr.HTML("", html_template=told, css_template=css, js_on_load=js, elem_id=elem_id)


def drawn(core: Core, value: str | None, name: str) -> tuple[FileRef | None, FileRef | None]:
    """Keeps the picture of an easel, and what is painted on it, white there; None where there is nothing.

    Raises:
        ValueError: it cannot be used, in one line.
    """
    if not value:
        return None, None
    try:
        own = json.loads(value)
        picture, paint = str(own["picture"]), str(own.get("mask") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{name} is no picture") from None
    image = core.inputs.add_base64(picture, name)
    if not paint:
        return image, None
    data = core.inputs.decoded(paint, name)
    load_image(data, name=name)  # which is safe to open
    with Image.open(io.BytesIO(data)) as layer:
        mask = np.asarray(layer.convert("RGBA"))[..., 3] > 127
    return image, core.inputs.add_picture(Image.fromarray(mask.astype(np.uint8) * 255), name) if mask.any() else None


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
