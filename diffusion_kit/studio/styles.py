"""Style presets: templates around a prompt, in one file that the user may edit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from diffusion_kit.ledger.place import home

FILE = "styles.yaml"
NONE = "none"


class Style(NamedTuple):
    prompt: str
    negative: str


def styles() -> dict[str, Style]:
    """Those of the user's file, or those that come along.

    Raises:
        ValueError: the file holds something else, in one line.
    """
    own = home() / FILE
    file = own if own.is_file() else Path(__file__).with_name(FILE)
    try:
        tree = yaml.safe_load(file.read_text("utf-8")) or {}
        found = {
            str(name): Style(value.get("prompt", "{prompt}"), value.get("negative", "")) for name, value in tree.items()
        }
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} holds no styles: {' '.join(str(error).split())}") from None
    for name, style in found.items():
        if "{prompt}" not in style.prompt:
            raise ValueError(f"{file}: the style {name} has no {{prompt}} in its prompt")
    return found


def styled(name: str, prompt: str, negative: str) -> tuple[str, str]:
    """Prompt and negative prompt in a style.

    Raises:
        ValueError: no such style.
    """
    if name in (NONE, "", None):
        return prompt, negative
    if name not in styles():
        raise ValueError(f"no style {name!r}; there are {', '.join(styles())}")
    style = styles()[name]
    return style.prompt.replace("{prompt}", prompt), ", ".join(part for part in (negative, style.negative) if part)
