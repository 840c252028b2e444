"""Controls: their parts on a page, and from their values to the controls of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.adapters.detectors import detectors, missing
from diffusion_kit.making.job import AUTO
from diffusion_kit.models.sources import locate
from diffusion_kit.recipes import ControlRecipe, Recipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import MOST_CONTROLS, Asked

from . import actions
from .events import QUIET, aside, owner_of
from .pictures import NOTHING, drawn, easel, layers, repainted
from .settings import Settings, Values

BARE: dict[str, Any] = {"buttons": [], "elem_classes": "studio-picture"}
AS_IT_IS, BY_KIND = "a control image", "a photo (own detector)"
DETECTORS = {BY_KIND: AUTO, AS_IT_IS: "none"}


@dataclass
class Slot:
    """One control of a page."""

    group: Any
    kind: Any
    image: Any
    detect: Any
    scale: Any
    start: Any
    end: Any
    mode: Any
    guidance: Any
    type: Any
    shown: Any  # a number that nobody sees: how many of all slots there are on the page, the same of each
    look: Any  # shows in `seen` what the network will see
    seen: Any

    @property
    def parts(self) -> list[Any]:
        return [part for name, part in vars(self).items() if name not in ("group", "shown", "look", "seen")]

    @property
    def plain(self) -> list[Any]:
        """Its parts but the picture."""
        return [part for part in self.parts if part is not self.image]

    def is_empty(self, values: Values) -> bool:
        return not layers(values[self.image], "the picture")[0] or not values[self.kind]

    def recipe(self, values: Values, core: Core, name: str) -> ControlRecipe | None:
        """The control of the values; None where it has no picture.

        Raises:
            ValueError: it cannot be used, in one line.
        """
        image, mask = drawn(core, values[self.image], name)
        if image is None or not values[self.kind]:
            return None
        detect = values[self.detect] or BY_KIND
        return ControlRecipe(
            values[self.kind],
            image,
            detect=DETECTORS.get(detect, detect),
            scale=float(values[self.scale]),
            start=float(values[self.start]),
            end=float(values[self.end]),
            mode=values[self.mode],
            mask=mask,
            guidance=float(values[self.guidance]) if values[self.guidance] else None,
            type=values[self.type] or None,
        )


def add_slots(core: Core, tab: str, settings: Settings) -> list[Slot]:
    """Controls, of which the first is there and a button shows the next; what may be picked follows the model."""
    shown = gr.Number(1, visible="hidden")
    seen = how_seen()
    made = [add_slot(core, tab, number, shown, seen) for number in range(1, MOST_CONTROLS + 1)]
    more = gr.Button("Add a control", size="sm", elem_id=f"{tab}-more")

    def fold(count: int) -> list[Any]:
        return [gr.update(visible=k < count) for k in range(MOST_CONTROLS)]

    more.click(lambda count: min(count + 1, MOST_CONTROLS), shown, shown, **QUIET)
    shown.change(fold, shown, [own.group for own in made], **QUIET)
    follow_model(core, settings, [own.kind for own in made])
    return made


def follow_model(core: Core, settings: Settings, parts: list[Any]) -> None:
    """Adapters that may be picked are those of the chosen model and of the folders, as these are now."""

    def look(label: str, *chosen: str) -> list[Any]:
        found = kinds(core, label)
        for kind in {kind for kind in chosen if kind and kind not in found}:
            gr.Warning(f"the control {kind} is not one of {label}: another is picked")
        return [gr.update(choices=found, value=own if own in found else next(iter(found), None)) for own in chosen]

    gr.on([settings.model.change, settings.again.click], look, [settings.model, *parts], parts, **QUIET)


def controls(core: Core, own: list[Slot], values: Values) -> tuple[ControlRecipe, ...]:
    """Of the slots on the page that have a picture.

    Raises:
        ValueError: one cannot be used, in one line.
    """
    on_page = own[: int(values[own[0].shown] or 1)]
    named = (slot.recipe(values, core, f"control {k}") for k, slot in enumerate(on_page, 1))
    return tuple(control for control in named if control is not None)


def kinds(core: Core, label: str | None = None) -> list[str]:
    """Controls that come with a model, by default the first, and those of the library."""
    place = locate(core.library.model(label or core.library.first))
    own = (
        sorted(path.parent.name for path in Path(place).glob("controls/*/*.safetensors"))
        if isinstance(place, Path)
        else []
    )
    return list(dict.fromkeys([*own, *core.library.find_controls()]))


def how_seen() -> list[str | tuple[str, str]]:
    """What a control's picture may be: a control image, or a photo for a detector; of one that cannot run it is told."""
    ways = [(f"{name} (its weights are not here)" if missing(name) else name, name) for name in detectors()]
    return [*DETECTORS, *ways]


def add_slot(core: Core, tab: str, number: int, shown: Any, seen: list[Any]) -> Slot:
    where, choices = f"{tab}-control-{number}", kinds(core)
    with gr.Accordion(f"Control {number}", open=True, visible=number == 1, elem_id=where) as group:
        with gr.Row():
            kind = gr.Dropdown(
                choices, value=choices[0] if choices else None, label="Adapter", elem_id=f"{where}-kind", min_width=120
            )
            detect = gr.Dropdown(
                seen,
                value=BY_KIND,
                label="The picture is",
                elem_id=f"{where}-detect",
                min_width=160,
            )
        image = easel("Picture (painted, it acts there alone)", 260, f"{where}-image")
        with gr.Row():
            scale = gr.Slider(0, 2, 1, step=0.05, label="Scale", elem_id=f"{where}-scale", min_width=120)
            start = gr.Slider(0, 1, 0, step=0.05, label="From", min_width=100)
            end = gr.Slider(0, 1, 1, step=0.05, label="Until", elem_id=f"{where}-end", min_width=100)
        with gr.Accordion("More", open=False), gr.Row():
            mode = gr.Dropdown(["balanced", "prompt", "control"], value="balanced", label="Mode", min_width=120)
            guidance = gr.Number(0, label="Guidance of its own (0: none)", minimum=0, step=0.5, min_width=120)
            type_ = gr.Textbox(label="Type (for a ControlNet-Union)", min_width=120)
        look = gr.Button("Show what the network will see", size="sm", elem_id=f"{where}-preview")
        preview = gr.Image(
            label="Control image", interactive=False, visible=False, height=200, elem_id=f"{where}-seen", **BARE
        )
    return Slot(group, kind, image, detect, scale, start, end, mode, guidance, type_, shown, look, preview)


def previews(core: Core, own: list[Slot], client: Any, inputs: set[Any], ask: Callable[[Values], Asked]) -> None:
    """The buttons of slots that show a control image as the network will see it, made on the queue.

    Args:
        ask: makes of the values of `inputs` the picture with all its controls: its size is the control image's.
    """

    def showing(number: int) -> Callable[..., Any]:
        def asked(values: dict[Any, Any]) -> tuple[Asked, int]:
            if own[number].is_empty(values):
                raise ValueError("give a picture first")
            return ask(values), sum(not slot.is_empty(values) for slot in own[:number])

        async def show(values: dict[Any, Any], request: gr.Request) -> Any:
            picture, before = await aside(asked, values)
            seen = await actions.awaited(
                lambda: core.submit_preview(picture, before, owner_of(request, values[client]))
            )
            return gr.update(value=seen, visible=True)

        return show

    for number, slot in enumerate(own):
        gr.on([slot.kind.change, slot.detect.change], lambda: gr.update(visible=False), None, slot.seen, **QUIET)
        slot.look.click(showing(number), inputs | {client}, slot.seen, api_visibility="private")


def lost(recipe: Recipe) -> list[str]:
    """What of a recipe the form has no place for, wherever it is restored."""
    own = recipe.controls
    found = ["scales for each level"] if any(isinstance(control.scale, tuple) for control in own) else []
    found += ["the background of a control"] if any(control.background for control in own) else []
    return found + ([f"controls after the {MOST_CONTROLS}th"] if len(own) > MOST_CONTROLS else [])


def filled_slots(core: Core, own: list[Slot], recipe: Recipe, gone: list[str]) -> Iterator[tuple[Any, Any]]:
    """Updates that show a recipe's controls.

    Args:
        gone: to which is added what cannot be shown.
    """
    labels = {source: label for label, source in core.library.find_controls().items()}
    known = kinds(core, core.library.label(recipe.model))
    yield own[0].shown, min(max(1, len(recipe.controls)), len(own))
    for k, part in enumerate(own):
        control = recipe.controls[k] if k < len(recipe.controls) else None
        kind = None if control is None else labels.get(control.kind, control.kind)
        if control is not None and kind not in known:
            gone.append(f"the control {control.kind}, which is not here")
        if control is None or kind not in known:
            yield part.image, NOTHING
            continue
        yield part.kind, kind
        yield from filled_slot(core, part, control, gone)


def filled_slot(core: Core, part: Slot, control: ControlRecipe, gone: list[str]) -> Iterator[tuple[Any, Any]]:
    detector, _, weights = (control.detect or "").partition(":")
    gone += [f"the detector {control.detect}"] if weights or (detector and detector not in detectors()) else []
    yield part.detect, detector if detector in detectors() else AS_IT_IS
    yield part.image, repainted(core, control.image, control.mask, f"of the control {control.kind}", gone)
    scale = sum(control.scale) / len(control.scale) if isinstance(control.scale, tuple) else control.scale
    yield part.scale, min(max(scale, 0), part.scale.maximum)
    yield part.start, control.start
    yield part.end, control.end
    yield part.mode, control.mode
    yield part.guidance, control.guidance or 0
    yield part.type, control.type or ""
