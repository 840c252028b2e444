"""Recipes into and out of image files.

A PNG holds its recipe in an iTXt chunk named "diffusion_kit", WEBP and JPEG in the EXIF field UserComment behind
"diffusion_kit:". Reading goes no further than the header: no pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from .foreign import ForeignRecipe, automatic1111, comfyui
from .recipe import Recipe
from .whole import write_whole

NAME = "diffusion_kit"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
QUALITY = 95  # of JPEG and WEBP, of 100
LARGEST = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: of more text PIL opens no PNG
LARGEST_JPEG = 65_533  # a JPEG segment, less the two bytes of its length
ASCII, UNICODE = b"ASCII\0\0\0", b"UNICODE\0"  # the character codes that EXIF puts before a comment


def save(picture: Image.Image, path: str | Path, recipe: Recipe | None = None, *, new: bool = False) -> None:
    """Writes a PNG, WEBP or JPEG beside its place and renames it: the file is whole or not there.

    Raises:
        ValueError: another suffix, or a recipe that does not fit the file, both before anything is written.
        FileExistsError: there is a file, which must be `new`.
    """
    path = Path(path)
    data = io.BytesIO()  # not to the file: where a disk is full, PIL may write half a JPEG without a word
    picture.save(data, **_options(path, recipe))
    write_whole(path, data.getbuffer(), new=new)


def check(path: str | Path, recipe: Recipe) -> None:
    """What `save` would refuse, before there is a picture.

    Raises:
        ValueError: another suffix, or a recipe that does not fit the file.
    """
    _options(Path(path), recipe)


def _options(path: Path, recipe: Recipe | None) -> dict[str, Any]:
    """What PIL is told about the file."""
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    options: dict[str, Any] = {"format": form, "quality": QUALITY}  # PNG has no quality
    if recipe is None:
        return options
    text = recipe.to_json()
    if len(text) > LARGEST:
        raise ValueError(
            f"the recipe of {path} takes {len(text) / 1e6:.0f} MB with its embedded pictures; "
            f"at most {LARGEST / 1e6:.0f} MB are kept in a picture: embed smaller ones, or none"
        )
    if form == "PNG":
        chunks = PngImagePlugin.PngInfo()  # longer texts uncompressed: PIL inflates no more than this
        chunks.add_itxt(NAME, text, zip=len(text) < PngImagePlugin.MAX_TEXT_CHUNK)
        return options | {"pnginfo": chunks}
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = ASCII + f"{NAME}:{text}".encode()
    if form == "JPEG" and (size := len(exif.tobytes())) > LARGEST_JPEG:
        raise ValueError(
            f"the recipe of {path} takes {size} bytes; at most {LARGEST_JPEG} fit in a JPEG: "
            "write PNG or WEBP, or embed no pictures"
        )
    return options | {"exif": exif}


def read(path: str | Path) -> Recipe | ForeignRecipe:
    """The recipe that a PNG, WEBP or JPEG file carries: ours, or what AUTOMATIC1111 or ComfyUI wrote.

    Raises:
        ValueError: no such file, no such image, or no recipe in it; a recipe that is broken or of a newer format.
    """
    texts, size = _header(Path(path))
    if NAME in texts:
        try:
            return Recipe.from_json(texts[NAME])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for name, reader in (("parameters", automatic1111), ("prompt", comfyui)):
        found = reader(texts[name], size) if name in texts else None
        if found:
            return found
    raise ValueError(
        f"{path} carries no recipe: it was not made by diffusion-kit, AUTOMATIC1111 or ComfyUI, "
        "or a program on the way removed it"
    )


def _header(path: Path) -> tuple[dict[str, str], tuple[int, int]]:
    """The texts of the file by their names, and the picture's width and height."""
    if not path.is_file():
        raise ValueError(f"no image file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many pixels, which are not decoded, and damaged EXIF
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as picture:
                texts = {str(name): value for name, value in picture.info.items() if isinstance(value, str)}
                return _exif_texts(picture.info.get("exif", b"")) | texts, picture.size
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WEBP image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def _exif_texts(data: bytes) -> dict[str, str]:
    """Texts of "NAME:" form in Make and Model, where ComfyUI writes them, and the user's comment."""
    exif = Image.Exif()
    try:
        exif.load(data)
        tags = [str(exif.get(tag, "")).partition(":") for tag in (ExifTags.Base.Make, ExifTags.Base.Model)]
        comment = _comment(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b""))
    except Exception:  # PIL has many errors for damaged EXIF; the file's other texts may be whole
        return {}
    name, _, text = comment.partition(":")
    texts = {NAME: text} if name == NAME else {"parameters": comment}
    return {name: text for name, _, text in tags} | texts


def _comment(value: Any) -> str:
    """A user's comment in its character code; programs disagree about the byte order of UNICODE."""
    if not isinstance(value, bytes):
        return str(value)
    code, text = value[:8], value[8:]
    if code != UNICODE:
        return text.decode("utf-8", "replace")
    little = text[1::2].count(0) > text[::2].count(0)  # most letters are ASCII, of which one byte is zero
    return text.decode("utf-16-le" if little else "utf-16-be", "replace").removeprefix("\ufeff")
