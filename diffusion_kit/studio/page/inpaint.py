"""*Inpaint*: what is painted over is made anew, with controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import Asked

from . import actions, form
from .output import Output, output

NAME = "inpaint"


@dataclass
class Inpaint:
    core: Core
    settings: form.Settings
    slots: list[form.Slot]
    canvas: Any
    strength: Any
    out: Output

    @property
    def inputs(self) -> set[Any]:
        return {self.canvas, self.strength, *self.settings.parts, *(part for slot in self.slots for part in slot.parts)}

    def asked(self, values: Mapping[Any, Any]) -> Asked:
        picture, mask = form.drawn(values[self.canvas])
        if picture is None:
            raise ValueError("give a picture to repaint")
        if mask is None:
            raise ValueError("paint over what is to be made anew")
        controls = form.controls(self.core, self.slots, values)
        image = self.core.inputs.add_picture(picture, "the picture")
        job = Job("", "", image, self.core.inputs.add_picture(mask, "the mask"), controls)
        return self.settings.asked(values, job, float(values[self.strength]))


def tab(core: Core, client: Any, job: Any) -> Inpaint:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            canvas = gr.ImageMask(
                label="Paint over what is to be made anew",
                type="pil",
                image_mode="RGBA",
                layers=False,
                transforms=(),
                elem_id=f"{NAME}-canvas",
                height=420,
            )
            settings = form.settings(core, NAME)
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength (1: nothing of what was there)")
            slots = form.slots(core, NAME, settings)
            go = gr.Button("Repaint (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
        with gr.Column(scale=5, min_width=320):
            out = output(core, NAME, job)
    made = Inpaint(core, settings, slots, canvas, strength, out)
    actions.wire(core, out, client, go, made.inputs, made.asked)
    return made
