"""*Create*: a picture from words, pictures and any controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_kit.adapters.pictures import FITS
from diffusion_kit.making.job import Job
from diffusion_kit.recipes import Recipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import Asked

from . import actions, examples
from .events import QUIET
from .output import Output, output
from .pictures import NOTHING, drawn, easel, repainted
from .settings import Settings, add_settings
from .slots import Slot, add_slots, controls, filled_slots, lost, previews

NAME = "create"
STRENGTH = 0.6  # of image-to-image


@dataclass
class Create:
    core: Core
    settings: Settings
    slots: list[Slot]
    starts: Any  # a tick that nobody sees: whether there is a picture to start from, which is shown then
    image: Any
    strength: Any
    fit: Any
    out: Output

    @property
    def drafted(self) -> list[Any]:
        """What a page that is loaded again has as it was; easels keep their pictures by themselves."""
        plain = [part for slot in self.slots for part in slot.plain]
        return [*self.settings.parts, self.starts, self.strength, self.fit, self.slots[0].shown, *plain]

    @property
    def inputs(self) -> set[Any]:
        return {self.image, *self.drafted, *(slot.image for slot in self.slots)}

    def asked(self, values: Mapping[Any, Any]) -> Asked:
        image, mask = drawn(self.core, values[self.image], "the picture to start from")
        job = Job("", "", image, mask, controls(self.core, self.slots, values))
        strength = float(values[self.strength]) if image is not None else None
        return self.settings.asked(values, job, strength, values[self.fit])

    def filled(self, recipe: Recipe) -> dict[Any, Any]:
        """Updates that show a recipe in the form; what it has no place for is told."""
        gone = lost(recipe)
        image = repainted(self.core, recipe.image, recipe.mask, "to start from", gone)
        strength = STRENGTH if recipe.strength is None else recipe.strength
        updates = self.settings.filled(recipe, gone)
        updates |= {self.starts: image != NOTHING, self.fit: recipe.fit, self.image: image, self.strength: strength}
        updates |= dict(filled_slots(self.core, self.slots, recipe, gone))
        if gone:
            gr.Warning(f"not restored: {', '.join(gone)}")
        return updates

    @property
    def fillable(self) -> list[Any]:
        return [
            *self.settings.parts,
            self.fit,
            self.starts,
            self.image,
            self.strength,
            self.slots[0].shown,
            *(p for s in self.slots for p in s.parts),
        ]


def tab(core: Core, client: Any, job: Any) -> Create:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            settings = add_settings(core, NAME)
            with gr.Accordion("Start from a picture, or repaint it", open=False, elem_id=f"{NAME}-start") as start:
                image = easel("Picture (painted, it is made anew there alone)", 260, f"{NAME}-image", "region")
                strength = gr.Slider(0, 1, STRENGTH, step=0.05, label="Strength", elem_id=f"{NAME}-strength")
            starts = gr.Checkbox(False, visible="hidden")
            slots = add_slots(core, NAME, settings)
            fit = gr.Radio(list(FITS), value="cover", label="Pictures of another shape")
            go = gr.Button("Generate (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
            tried = examples.row(core)
        with gr.Column(scale=5, min_width=320):
            out = output(core, NAME, job)
    # A page that is loaded again finds the picture only where it is shown.
    image.input(None, image, starts, js="(own) => Boolean(own)", **QUIET)
    starts.change(lambda on: gr.update(open=True) if on else gr.skip(), starts, start, **QUIET)
    made = Create(core, settings, slots, starts, image, strength, fit, out)
    actions.wire(core, out, client, go, made.inputs, made.asked)
    previews(core, slots, client, made.inputs, made.asked)
    examples.wire(tried, made, client)
    return made
