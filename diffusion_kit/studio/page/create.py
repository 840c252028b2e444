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
from .output import Output, output
from .pictures import given, kept, opened
from .settings import Settings, add_settings
from .slots import Slot, add_slots, controls, filled_slots, lost, previews

NAME = "create"


@dataclass
class Create:
    core: Core
    settings: Settings
    slots: list[Slot]
    image: Any
    strength: Any
    fit: Any
    out: Output

    @property
    def inputs(self) -> set[Any]:
        own = [self.image, self.strength, self.fit, *self.settings.parts]
        return {*own, *(part for slot in self.slots for part in slot.parts)}

    def asked(self, values: Mapping[Any, Any]) -> Asked:
        file = values[self.image]
        image = None if file is None else kept(self.core, file, "the picture to start from")
        job = Job("", "", image, None, controls(self.core, self.slots, values))
        strength = float(values[self.strength]) if image is not None else None
        return self.settings.asked(values, job, strength, values[self.fit])

    def filled(self, recipe: Recipe) -> dict[Any, Any]:
        """Updates that show a recipe in the form; what it has no place for is told."""
        if gone := lost(recipe):
            gr.Warning(f"not restored: {', '.join(gone)}")
        image = opened(self.core, recipe.image) if recipe.image is not None else None
        updates = self.settings.filled(recipe) | {self.fit: recipe.fit}
        updates |= {self.image: image, self.strength: recipe.strength or 0.6}
        return updates | dict(filled_slots(self.core, self.slots, recipe))

    @property
    def fillable(self) -> list[Any]:
        groups = [slot.group for slot in self.slots]
        return [
            *self.settings.parts,
            self.fit,
            self.image,
            self.strength,
            self.slots[0].shown,
            *groups,
            *(p for s in self.slots for p in s.parts),
        ]


def tab(core: Core, client: Any, job: Any) -> Create:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            settings = add_settings(core, NAME)
            with gr.Accordion("Start from a picture", open=False, elem_id=f"{NAME}-start"):
                image = given("Picture", f"{NAME}-image")
                strength = gr.Slider(0, 1, 0.6, step=0.05, label="Strength", elem_id=f"{NAME}-strength")
            slots = add_slots(core, NAME, settings)
            fit = gr.Radio(list(FITS), value="cover", label="Pictures of another shape")
            go = gr.Button("Generate (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
            tried = examples.row(core)
        with gr.Column(scale=5, min_width=320):
            out = output(core, NAME, job)
    made = Create(core, settings, slots, image, strength, fit, out)
    actions.wire(core, out, client, go, made.inputs, made.asked)
    previews(core, slots, made.inputs, made.asked)
    examples.wire(tried, made, client)
    return made
