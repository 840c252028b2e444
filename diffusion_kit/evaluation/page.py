"""A report as a page: index.html beside its pictures, which needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from PIL import Image

from diffusion_kit.adapters.pictures import eight_bit

from .report import Report, Shown

HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
pre { overflow-x: auto } section { display: flex; flex-wrap: wrap; gap: 8px } h2 { font-size: 1em; margin: 2em 0 .5em }
figure { margin: 0 } figcaption { font-size: .85em; color: #555 } img { width: 192px; image-rendering: pixelated }
</style>
"""


def write(report: Report, folder: Path) -> Path:
    """Pictures are NUMBER-N.png, in the order in which they are shown."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD, f"<h1>Evaluation</h1>\n<pre>{escape(report.table())}</pre>\n"]
    for number, shown in enumerate(report.gallery):
        parts.append(f"<h2>{escape(shown.name)}: {escape(shown.prompt)}</h2>\n<section>\n")
        for k, (caption, picture) in enumerate(pictures(shown)):
            file = f"{number:03}-{k:02}.png"
            eight_bit(picture).save(folder / file)
            label = escape(f"{shown.name}: {caption}", quote=True)
            parts.append(
                f'<figure><img src="{file}" alt="{label}"><figcaption>{escape(caption)}</figcaption></figure>\n'
            )
        parts.append("</section>\n")
    index = folder / "index.html"
    index.write_text("".join(parts) + "</html>\n", encoding="utf-8", errors="backslashreplace")
    return index


def pictures(shown: Shown) -> Iterator[tuple[str, Image.Image]]:
    """The condition, and of each arm what was made and what was extracted from it."""
    yield "condition", shown.condition
    for arm, made, extracted in shown.made:
        yield arm, made
        if extracted is not None:
            yield f"{arm}, extracted", extracted
