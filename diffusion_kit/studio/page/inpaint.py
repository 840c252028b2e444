"""*Inpaint*: what is painted over is made anew, with controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import Asked

from . import actions
from .output import Output, output
from .pictures import drawn, easel
from .settings import Settings, add_settings
from .slots import Slot, add_slots, controls, previews

NAME = "inpaint"


@dataclass
class Inpaint:
    core: Core
    settings: Settings
    slots: list[Slot]
    canvas: Any
    strength: Any
    out: Output

    @property
    def drafted(self) -> list[Any]:
        """What a page that is loaded again has as it was; easels keep their pictures by themselves."""
        plain = [part for slot in self.slots for part in slot.plain]
        return [*self.settings.parts, self.strength, self.slots[0].shown, *plain]

    @property
    def inputs(self) -> set[Any]:
        return {self.canvas, *self.drafted, *(slot.image for slot in self.slots)}

    def asked(self, values: Mapping[Any, Any]) -> Asked:
        asked = self.unchecked(values)
        if asked.job.image is None:
            raise ValueError("give a picture to repaint")
        if asked.job.mask is None:
            raise ValueError("paint over what is to be made anew")
        return asked

    def unchecked(self, values: Mapping[Any, Any]) -> Asked:
        """What is asked for, be it painted already or not."""
        image, mask = drawn(self.core, values[self.canvas], "the picture")
        job = Job("", "", image, mask, controls(self.core, self.slots, values))
        return self.settings.asked(values, job, float(values[self.strength]))


def tab(core: Core, client: Any, job: Any) -> Inpaint:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            canvas = easel("Paint over what is to be made anew", 420, f"{NAME}-canvas", "region")
            settings = add_settings(core, NAME)
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength (1: nothing of what was there)")
            slots = add_slots(core, NAME, settings)
            go = gr.Button("Repaint (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
        with gr.Column(scale=5, min_width=320):
            out = output(core, NAME, job)
    made = Inpaint(core, settings, slots, canvas, strength, out)
    actions.wire(core, out, client, go, made.inputs, made.asked)
    previews(core, slots, client, made.inputs, made.unchecked)
    return made
