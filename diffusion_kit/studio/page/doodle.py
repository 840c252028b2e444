"""*Doodle*: lines are drawn, and the picture follows when the pen lifts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffusion_kit.making.job import Job
from diffusion_kit.recipes import ControlRecipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.requests import Asked

from . import actions
from .events import QUIET, aside, owner_of
from .output import Output, output
from .pictures import drawing, easel
from .settings import Settings, add_settings
from .slots import follow_model, kinds

NAME = "doodle"
LINE = 128  # of 255: darker is a stroke
KIND = "sketch"
EXACT = "exactly"
FAITH = {"freely": None, EXACT: 2.0}  # guidance of the control's own, a third call of the network in every step


@dataclass
class Doodle:
    core: Core
    settings: Settings
    pad: Any
    kind: Any
    scale: Any
    faith: Any
    live: Any
    out: Output

    @property
    def drafted(self) -> list[Any]:
        """What a page that is loaded again has as it was; the pad keeps its drawing by itself."""
        return [*self.settings.parts, self.kind, self.scale, self.faith, self.live]

    @property
    def inputs(self) -> set[Any]:
        return {self.pad, *self.drafted}

    def asked(self, values: Mapping[Any, Any]) -> Asked:
        strokes = self.core.inputs.add_picture(
            lines(drawing(self.core, values[self.pad], "the drawing")), "the drawing"
        )
        scale, guidance = float(values[self.scale]), FAITH[values[self.faith]]
        control = ControlRecipe(values[self.kind], strokes, detect="none", scale=scale, guidance=guidance)
        return self.settings.asked(values, Job("", "", None, None, (control,)))


class NothingDrawn(ValueError):
    """There is no stroke: nothing is to be made, and after a stroke was wiped nobody has to be told."""


def lines(picture: Image.Image | None) -> Image.Image:
    """White strokes on black, as controls of sketches expect, of dark lines on light.

    Raises:
        NothingDrawn: there are none.
    """
    strokes = None if picture is None else np.asarray(picture.convert("L")) < LINE
    if strokes is None or not strokes.any():
        raise NothingDrawn("draw something first")
    return Image.fromarray((strokes * 255).astype(np.uint8)).convert("RGB")


def tab(core: Core, client: Any, job: Any) -> Doodle:
    choices = kinds(core)
    first = next((kind for kind in choices if KIND in kind), choices[0] if choices else None)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            pad = easel("Drawing, black on white", 512, f"{NAME}-pad", "sketch")
            with gr.Row():
                live = gr.Checkbox(True, label="When the pen lifts", elem_id=f"{NAME}-live", min_width=120)
                kind = gr.Dropdown(choices, value=first, label="Adapter", elem_id=f"{NAME}-kind", min_width=120)
                scale = gr.Slider(0, 2, 1, step=0.05, label="Scale", min_width=120)
                faith = gr.Radio(
                    list(FAITH), value=EXACT, label="Lines are followed", elem_id=f"{NAME}-faith", min_width=120
                )
            settings = add_settings(core, NAME)
            go = gr.Button("Generate (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
        with gr.Column(scale=5, min_width=320):
            out = output(core, NAME, job)
    follow_model(core, settings, [kind])
    made = Doodle(core, settings, pad, kind, scale, faith, live, out)
    actions.wire(core, out, client, go, made.inputs, made.asked)
    lifted(made, client)
    return made


def lifted(own: Doodle, client: Any) -> None:
    """Makes the picture anew after each stroke; what the last stroke asked for is cancelled, by an event of its own: gradio
    keeps the one that makes pictures back until the one before it is over."""
    out, core = own.out, own.core

    def cancel(values: dict[Any, Any], request: gr.Request) -> None:
        old = core.queue.find(values[out.job] or "", owner_of(request, values[client]))
        if values[own.live] and old is not None:
            core.queue.cancel(old)

    async def redraw(values: dict[Any, Any], request: gr.Request) -> actions.Updates:
        yield {out.progress: gr.skip()}  # gradio empties what a handler says nothing of
        if not values[own.live]:
            return
        owner = owner_of(request, values[client])
        if (old := core.queue.find(values[out.job] or "", owner)) is not None:
            core.queue.cancel(old)
        asked = await aside(drawn, values)
        if asked is None:
            return
        async for update in actions.run(core, out, asked, owner, values[out.gallery], False):
            yield update

    def drawn(values: dict[Any, Any]) -> Asked | None:
        with suppress(NothingDrawn):
            return own.asked(values)
        return None

    inputs = own.inputs | {client, out.gallery, out.job}
    own.pad.input(cancel, {own.live, client, out.job}, None, trigger_mode="multiple", **QUIET)
    own.pad.input(redraw, inputs, out.parts, trigger_mode="always_last", **QUIET)
