"""Rows of text in columns."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_kit.recipes.recipe import printable


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Every column as wide as its widest cell, two spaces between; control characters as escapes."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
