"""A pad to draw on: black on white, with pen width, eraser, undo, clear and upload; a reload finds the drawing again."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffusion_kit.adapters.pictures import load_image

HERE = Path(__file__).parent
LARGEST = 4_000_000  # characters of a drawing


def pad(elem_id: str) -> Any:
    """A part of the page, whose value is the drawing as a data URL; its event `input` comes when the pen lifts."""
    parts = (HERE / f"pad.{kind}" for kind in ("html", "css", "js"))
    html, css, js = (file.read_text("utf-8") for file in parts)
    return gr.HTML("", html_template=html, css_template=css, js_on_load=js, elem_id=elem_id)


def drawing(value: Any) -> Image.Image | None:
    """The drawing of a pad's value; None where nobody drew.

    Raises:
        ValueError: it is no picture.
    """
    if not value:
        return None
    if not isinstance(value, str) or not value.startswith("data:image/png;base64,") or len(value) > LARGEST:
        raise ValueError("the drawing is no picture")
    try:
        data = base64.b64decode(value.partition(",")[2], validate=True)
    except binascii.Error:
        raise ValueError("the drawing is no picture") from None
    return load_image(data, name="the drawing")
