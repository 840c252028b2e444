"""What AUTOMATIC1111's web UI and ComfyUI write into their pictures, read as far as it can be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .recipe import table

Size = tuple[int, int]
Nodes = dict[str, dict[str, Any]]  # id -> inputs: values, or links [id, number of the output]


@dataclass(frozen=True)
class ForeignRecipe:
    """What could be read from another program's picture; None is unknown.

    Attributes:
        software: "AUTOMATIC1111" or "ComfyUI".
        sampler, model: as that program calls them.
    """

    software: str
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    model: str | None = None

    def describe(self) -> str:
        """Aligned lines to read, without what is unknown."""
        return table(
            [
                ("made with", self.software),
                ("prompt", self.prompt),
                ("negative prompt", self.negative_prompt),
                ("seed", self.seed),
                ("steps", self.steps),
                ("guidance scale", self.guidance_scale),
                ("size", f"{self.width} x {self.height}" if self.width and self.height else None),
                ("sampler", self.sampler),
                ("model", self.model),
            ]
        )


LATENTS = ("latent", "samples", "pixels", "image")  # inputs through which the latents of a sampler come
TEXTS = ("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt")  # inputs of text encoders

# Name and value between commas; a value in quotes is a JSON string. Possessive (++, *+): time stays linear in the text.
_SETTING = re.compile(r'(?:^|,)\s*+([^:,"]++):\s*+("(?:[^"\\]|\\.)*+"|[^,]*+)(?=,|$)')


def automatic1111(text: str, size: Size) -> ForeignRecipe | None:
    """The prompt, a negative prompt behind "Negative prompt:", and a last line "Steps: 20, Sampler: Euler a, ...".

    Lines of the prompt may begin with "Steps:" too; extensions add lines behind the last one, and to it settings with
    names that were there before. Nodes of ComfyUI that save pictures write it too. The size is that of the first pass;
    `size` (width, height), the picture's own, stands in where none is written. None: no such text.
    """
    lines = text.split("\n")
    last = max((k for k, line in enumerate(lines) if line.startswith("Steps: ")), default=None)
    if last is None:
        return None
    settings = {name.strip(): _unquoted(value) for name, value in reversed(_SETTING.findall(lines[last]))}
    prompt, _, negative = "\n".join(["", *lines[:last]]).partition("\nNegative prompt:")
    written = re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get("Size", ""))
    width, height = (int(written[1]), int(written[2])) if written else size
    schedule = settings.get("Schedule type", "Automatic")
    return ForeignRecipe(
        "AUTOMATIC1111",
        prompt=prompt.strip(),
        negative_prompt=negative.strip() or None,
        seed=_number(int, settings.get("Seed")),
        steps=_number(int, settings.get("Steps")),
        guidance_scale=_number(float, settings.get("CFG scale")),
        width=width,
        height=height,
        sampler=_joined([settings.get("Sampler"), schedule if schedule != "Automatic" else None]),
        model=settings.get("Model"),
    )


def _unquoted(value: str) -> str:
    value = value.strip()
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def comfyui(text: str, size: Size) -> ForeignRecipe | None:
    """The graph of nodes in ComfyUI's API form, read backwards from the sampler of the picture's first pass.

    Texts that are combined are joined by line breaks. `size` (width, height), the picture's own, stands in where the
    latents have none. None: no such graph.
    """
    nodes = _nodes(text)
    if not nodes:
        return None
    saved = _upstream(nodes, [key for key, inputs in nodes.items() if "filename_prefix" in inputs], ("",))
    samplers = dict.fromkeys(key for key in (*saved, *nodes) if _samples(nodes[key]))
    passes = [key for key in _upstream(nodes, [*samplers][:1], LATENTS) if key in samplers]
    parts = _upstream(nodes, passes[-1:], ("noise", "guider", "sigmas", "sampler"))
    positive = _upstream(nodes, _targets(nodes, parts, ("positive", "conditioning")), ("positive", "conditioning"))
    negative = _upstream(nodes, _targets(nodes, parts, ("negative",)), ("negative", "conditioning"))
    width, height = _latent_size(nodes, _upstream(nodes, passes[-1:], LATENTS)) or size
    return ForeignRecipe(
        "ComfyUI",
        prompt=_text(nodes, positive, "positive"),
        negative_prompt=_text(nodes, negative, "negative"),
        seed=_number(int, _first(nodes, parts, "seed", "noise_seed")),
        steps=_number(int, _first(nodes, parts, "steps")),
        guidance_scale=_number(float, _first(nodes, [*parts, *positive], "cfg", "guidance")),
        width=width,
        height=height,
        sampler=_joined([_first(nodes, parts, "sampler_name"), _first(nodes, parts, "scheduler")]),
        model=_joined([_first(nodes, _upstream(nodes, parts, ("model",)), "ckpt_name", "unet_name")]),
    )


def _nodes(text: str) -> Nodes:
    try:
        graph = json.loads(text)  # ComfyUI writes NaN, which Python reads
    except (ValueError, RecursionError):
        return {}
    entries = graph.items() if isinstance(graph, dict) else ()
    nodes = {key: node for key, node in entries if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    cut = "ConditioningZeroOut"  # what comes in there does not come out
    return {
        key: {} if node["class_type"] == cut else node["inputs"] for key, node in nodes.items() if "class_type" in node
    }


def _samples(inputs: dict[str, Any]) -> bool:
    return "latent_image" in inputs and ("positive" in inputs or "guider" in inputs)


def _link(nodes: Nodes, value: Any) -> str | None:
    """The node that a link [id, output] leads to."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in nodes:
        return value[0]
    return None


def _upstream(nodes: Nodes, start: Iterable[str], inputs: tuple[str, ...]) -> list[str]:
    """The nodes at `start` and those behind them, nearest first, through inputs whose names begin so.

    A node of one input, as Reroute, is passed through whatever its name.
    """
    queue = list(dict.fromkeys(start))
    seen = set(queue)
    for key in queue:  # grows
        for name, value in nodes[key].items():
            target = _link(nodes, value)
            if target and target not in seen and (name.startswith(inputs) or len(nodes[key]) == 1):
                seen.add(target)
                queue.append(target)
    return queue


def _targets(nodes: Nodes, keys: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """The node behind the first link under one of the names; empty if there is none."""
    found = (_link(nodes, nodes[key].get(name)) for key in keys for name in names)
    return [target for target in found if target][:1]


def _value(nodes: Nodes, value: Any) -> Any:
    """A value, or the one at the end of its link through nodes of one input (primitives); None where there is none."""
    for _ in range(100):  # longer is a circle
        target = _link(nodes, value)
        if target is None:
            return value
        if len(nodes[target]) != 1:
            return None
        (value,) = nodes[target].values()
    return None


def _first(nodes: Nodes, keys: Iterable[str], *names: str) -> Any:
    """The first value that a node has under one of the names."""
    values = (_value(nodes, nodes[key].get(name)) for key in keys for name in names)
    return next((value for value in values if value is not None), None)


def _text(nodes: Nodes, keys: Iterable[str], role: str) -> str | None:
    """All texts of the nodes; None if there are none, or one is made by a node that had to be run."""
    found = []
    for key in keys:
        given = {name: _value(nodes, nodes[key][name]) for name in (*TEXTS, role) if name in nodes[key]}
        found += [text for name, text in given.items() if name in TEXTS or isinstance(text, str)]
    if not found or not all(isinstance(text, str) for text in found):
        return None
    return "\n".join(text for text in dict.fromkeys(found) if text)


def _latent_size(nodes: Nodes, keys: Iterable[str]) -> Size | None:
    sized = next((nodes[key] for key in keys if {"width", "height"} <= set(nodes[key])), {})
    width, height = (_number(int, _value(nodes, sized.get(name))) for name in ("width", "height"))
    return (width, height) if width and height else None


def _number(kind: type[int] | type[float], value: Any) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 2**64 else None


def _joined(words: Iterable[Any]) -> str | None:
    return " ".join(word for word in words if isinstance(word, str)) or None
