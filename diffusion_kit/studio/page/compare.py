"""*Compare*: a grid over a control's scale and the seed, or over kinds of controls, with the fidelity under each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job as Wanted
from diffusion_kit.recipes import ControlRecipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.queue import DONE, OVER, Full, Job
from diffusion_kit.studio.requests import Asked

from . import actions, slots
from .output import GLANCE, STILL
from .pictures import given, kept
from .settings import Settings, add_settings

NAME = "compare"
BY_SCALE, BY_KIND = "scale x seed", "adapters side by side"


@dataclass(frozen=True)
class Cell:
    """A picture of the grid: its caption, and what is asked for."""

    caption: str
    asked: Asked


@dataclass
class Compare:
    core: Core
    settings: Settings
    what: Any
    image: Any
    kind: Any
    detect: Any
    kinds: Any
    scales: Any
    seeds: Any

    @property
    def inputs(self) -> set[Any]:
        own = {self.what, self.image, self.kind, self.detect, self.kinds, self.scales, self.seeds}
        return own | set(self.settings.parts)

    def cells(self, values: Mapping[Any, Any]) -> list[Cell]:
        """
        Raises:
            ValueError: nothing to compare, or more than the studio compares at once.
        """
        if values[self.image] is None:
            raise ValueError("give the control's picture")
        image = kept(self.core, values[self.image], "the control's picture")
        detect = slots.DETECTORS.get(values[self.detect], values[self.detect])
        seeds = [int(values[self.settings.seed] or 0) + k for k in range(int(values[self.seeds]))]
        if values[self.what] == BY_SCALE:
            rows = [(f"scale {scale:g}", values[self.kind], scale) for scale in numbers(values[self.scales])]
        else:
            rows = [(kind, kind, 1.0) for kind in values[self.kinds] or ()]
        most = self.core.config.cells
        if not 1 <= len(rows) * len(seeds) <= most:
            raise ValueError(f"these are {len(rows) * len(seeds)} pictures; a grid has 1 to {most}")
        found = []
        for (label, kind, scale), seed in itertools.product(rows, seeds):
            control = ControlRecipe(kind, image, detect=detect, scale=scale)
            asked = self.settings.asked(values, Wanted("", "", None, None, (control,)))
            found.append(Cell(f"{label}, seed {seed}", replace(asked, seed=seed)))
        return found


def numbers(text: str) -> list[float]:
    """
    Raises:
        ValueError: not numbers with commas between.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"scales are {text!r}; they must be numbers with commas between, for example 0, 0.5, 1"
        ) from None


def tab(core: Core, client: Any) -> Compare:
    choices = slots.kinds(core)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            settings = add_settings(core, NAME)
            what = gr.Radio([BY_SCALE, BY_KIND], value=BY_SCALE, label="Compare", elem_id=f"{NAME}-what")
            image = given("The control's picture", f"{NAME}-image")
            with gr.Row():
                kind = gr.Dropdown(choices, value=choices[0] if choices else None, label="Adapter", min_width=120)
                detect = gr.Dropdown(list(slots.DETECTORS), value=slots.BY_KIND, label="The picture is", min_width=160)
            kinds = gr.Dropdown(choices, value=choices[:3], multiselect=True, label="Adapters side by side")
            with gr.Row():
                scales = gr.Textbox("0, 0.5, 1", label="Scales", elem_id=f"{NAME}-scales", min_width=120)
                seeds = gr.Slider(1, 8, 2, step=1, label="Seeds, from the one of the settings", min_width=120)
            with gr.Row():
                go = gr.Button("Compare (Ctrl+Enter)", variant="primary", elem_id=f"{NAME}-go")
                cancel = gr.Button("Cancel (Esc)", variant="stop", elem_id=f"{NAME}-cancel")
        with gr.Column(scale=6, min_width=320):
            words = gr.Markdown(elem_id=f"{NAME}-progress")
            grid = gr.Gallery(
                label="Fidelity stands under each", columns=3, height="85vh", elem_id=f"{NAME}-grid", **STILL
            )
    made = Compare(core, settings, what, image, kind, detect, kinds, scales, seeds)
    running = gr.State([])
    wire(made, client, go, cancel, words, grid, running)
    return made


def wire(own: Compare, client: Any, go: Any, cancel: Any, words: Any, grid: Any, running: Any) -> None:
    core = own.core

    async def start(values: dict[Any, Any], request: gr.Request) -> actions.Updates:
        with actions.said():
            cells = own.cells(values)
        owner, jobs, columns = actions.owner_of(request, values[client]), list[Job](), int(values[own.seeds])
        yield {words: f"0 of {len(cells)}", grid: gr.update(value=[], columns=columns)}
        shown = 0
        while len(jobs) < len(cells) or any(job.state not in OVER for job in jobs):
            while len(jobs) < len(cells) and len(core.queue) < max(1, core.queue.size // 2):  # others want in, too
                try:
                    jobs.append(core.submit(cells[len(jobs)].asked, owner, measured=True))
                except Full:
                    break
            if any(job.state in OVER and job.state != DONE for job in jobs):
                break
            done = sum(job.state == DONE for job in jobs)
            update = {words: f"{done} of {len(cells)}", running: [job.id for job in jobs]}
            yield update | ({grid: pictures(cells, jobs)} if done > shown else {})
            shown = done
            await asyncio.sleep(GLANCE)
        failed = next((job.error for job in jobs if job.error), None)
        for job in jobs:
            core.queue.cancel(job)
        done = sum(job.state == DONE for job in jobs)
        yield {words: failed or f"{done} of {len(cells)}", grid: pictures(cells, jobs), running: []}

    def stop(ids: list[str], own_client: str | None, request: gr.Request) -> None:
        for id in ids:
            if (job := core.queue.find(id, actions.owner_of(request, own_client))) is not None:
                core.queue.cancel(job)

    same: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    go.click(start, own.inputs | {client}, [words, grid, running], **same)
    cancel.click(stop, [running, client], None, **same)


def pictures(cells: list[Cell], jobs: list[Job]) -> list[tuple[str, str]]:
    """Those that are made, with their captions."""
    found = []
    for cell, job in zip(cells, jobs, strict=False):
        if job.state == DONE:
            figures = ", ".join(f"{name} {value:.2f}" for name, value in job.result.fidelity)
            found.append((str(job.result.file), f"{cell.caption}: {figures or 'not measured'}"))
    return found
