"""Pictures on the page: given, painted on, and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffusion_kit.adapters.pictures import load_image
from diffusion_kit.recipes import FileRef
from diffusion_kit.studio.core import Core


def easel(label: str, height: int, elem_id: str) -> Any:
    """A picture that is painted on, of the formats and sizes that the kit opens."""
    given: dict[str, Any] = {"label": label, "height": height, "elem_id": elem_id, "layers": False, "transforms": ()}
    part: Any = gr.ImageMask(type="pil", image_mode="RGBA", format="png", **given)  # webp would lose a little
    # A class of our own would be cleaner; gradio writes a file of types beside the source of each that it meets.
    part.convert_and_format_image = partial(safely, part.convert_and_format_image)
    return part


def safely(decode: Callable[..., Any], file: Any, *options: Any, **more: Any) -> Any:
    """
    Raises:
        gr.Error: no picture that the kit opens, in one line.
    """
    if file is not None:
        try:
            load_image(
                bytes(file) if isinstance(file, (bytes, bytearray, memoryview)) else file.path, name="the picture"
            )
        except ValueError as error:
            raise gr.Error(str(error), title="not like this", print_exception=False) from None
    return decode(file, *options, **more)


def given(label: str, elem_id: str) -> Any:
    """A picture that is not painted on; its value is the file as the user gave it, which gradio does not open."""
    part: Any = gr.Image(label=label, type="filepath", image_mode=None, height=220, elem_id=elem_id)
    part.preprocess = partial(safely, part.preprocess)
    return part


def kept(core: Core, file: str, name: str) -> FileRef:
    """Keeps a picture that was given, with the bytes that the user gave.

    Raises:
        ValueError: it cannot be used, in one line.
    """
    return core.inputs.add(Path(file).read_bytes(), name)


def drawn(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture of an editor, and what was painted on it: white there; None where there is nothing."""
    if not value:
        return None, None
    background = value.get("background")
    layers = [layer for layer in value.get("layers") or () if layer is not None]
    if background is None or background.getextrema()[-1] == (0, 0):
        return None, None
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    mask = np.logical_or.reduce(painted) if painted else np.zeros(background.size[::-1], bool)
    if background.mode == "RGBA":
        background = Image.alpha_composite(Image.new("RGBA", background.size, "white"), background)
    return background.convert("RGB"), Image.fromarray((mask * 255).astype(np.uint8)) if mask.any() else None


def sketched(picture: Image.Image | None, mask: Image.Image | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Of strokes on an empty field, which are no region of a picture: the strokes, black on white, are the picture."""
    if picture is None or picture.getextrema() != ((255, 255),) * 3:
        return picture, mask
    return (None, None) if mask is None else (Image.eval(mask, lambda value: 255 - value).convert("RGB"), None)


def opened(core: Core, ref: FileRef) -> Image.Image | None:
    """A recipe's picture, if it may be read: one of the studio's own, or any where there is one user, at the machine."""
    from diffusion_kit.making.pictures import opened as open_ref

    if ref.data is None and not core.config.is_own(ref.path) and core.config.is_shared:
        return None
    try:
        return open_ref(ref)
    except ValueError:  # moved or changed since
        return None


def painted(picture: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
    """An editor's value: the picture, and what is painted on it."""
    if mask is None:
        return {"background": picture, "layers": [], "composite": picture}
    layer = Image.new("RGBA", picture.size, "black")
    layer.putalpha(mask.convert("L").resize(picture.size).point(lambda value: 255 * (value > 127)))
    return {"background": picture, "layers": [layer], "composite": picture}  # gradio takes it for the background
