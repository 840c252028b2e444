"""*Compare*: a grid over a control's scale and the seed, or over kinds of controls, with the fidelity under each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job as Wanted
from diffusion_kit.recipes import ControlRecipe
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.queue import DONE, OVER, Full, Job
from diffusion_kit.studio.requests import Asked

from . import actions, slots
from .events import QUIET, aside, owner_of
from .output import GLANCE, STILL
from .pictures import drawn, easel
from .settings import Settings, add_settings

NAME = "compare"
BY_SCALE, BY_KIND = "scale x seed", "adapters side by side"
MOST = 64  # owners whose last comparison is remembered


@dataclass(frozen=True)
class Cell:
    """A picture of the grid: its caption, and what is asked for."""

    caption: str
    asked: Asked


@dataclass(eq=False)
class Comparison:
    """A grid, and the jobs of those cells that were asked for so far."""

    owner: str
    cells: list[Cell]
    columns: int
    jobs: list[Job] = field(default_factory=list)
    stopped: bool = False

    def ask(self, core: Core) -> None:
        """For more, while the queue has room for others too."""
        while len(self.jobs) < len(self.cells) and len(core.queue) < max(1, core.queue.size // 2):
            try:
                self.jobs.append(core.submit(self.cells[len(self.jobs)].asked, self.owner, measured=True))
            except Full:
                return

    def stop(self, core: Core) -> None:
        self.stopped = True
        for job in self.jobs:
            core.queue.cancel(job)

    @property
    def done(self) -> int:
        return sum(job.state == DONE for job in self.jobs)

    @property
    def is_over(self) -> bool:
        """Whether all are made; or one failed, or it was stopped."""
        states = [job.state for job in self.jobs]
        return self.stopped or self.done == len(self.cells) or any(own in OVER and own != DONE for own in states)

    @property
    def said(self) -> str:
        return next((job.error for job in self.jobs if job.error), f"{self.done} of {len(self.cells)}")

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Those that are made, with their captions."""
        found = []
        for cell, job in zip(self.cells, self.jobs, strict=False):  # fewer jobs than cells, while they are made
            if job.state == DONE:
                figures = ", ".join(f"{name} {value:.2f}" for name, value in job.result.fidelity)
                found.append((str(job.result.file), f"{cell.caption}: {figures or 'not measured'}"))
        return found


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
    words: Any
    grid: Any
    running: dict[str, Comparison] = field(default_factory=dict)  # the last of each owner

    @property
    def drafted(self) -> list[Any]:
        """What a page that is loaded again has as it was."""
        return [*self.settings.parts, self.what, self.kind, self.detect, self.kinds, self.scales, self.seeds]

    @property
    def inputs(self) -> set[Any]:
        return {self.image, *self.drafted}

    @property
    def shown(self) -> list[Any]:
        return [self.words, self.grid]

    async def follow(self, made: Comparison) -> actions.Updates:
        """Updates until it is over."""
        yield {self.words: made.said, self.grid: gr.update(value=made.pictures, columns=made.columns)}
        done = made.done
        while not made.is_over:
            made.ask(self.core)
            yield {self.words: made.said} | ({self.grid: made.pictures} if made.done > done else {})
            done = made.done
            await asyncio.sleep(GLANCE)
        made.stop(self.core)  # where one failed, the others
        yield {self.words: made.said, self.grid: made.pictures}

    async def resume(self, client: str | None, request: gr.Request) -> actions.Updates:
        """What a page that is loaded again does: it follows the comparison that its browser asked for last."""
        yield {self.words: gr.skip()}  # gradio empties what a handler says nothing of
        if (made := self.running.get(owner_of(request, client))) is not None:
            async for update in self.follow(made):
                yield update

    def cells(self, values: Mapping[Any, Any]) -> list[Cell]:
        """
        Raises:
            ValueError: nothing to compare, or more than the studio compares at once.
        """
        image, region = drawn(self.core, values[self.image], "the control's picture")
        if image is None:
            raise ValueError("give the control's picture")
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
            control = ControlRecipe(kind, image, detect=detect, scale=scale, mask=region)
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
            image = easel("The control's picture (painted, it acts there alone)", 260, f"{NAME}-image")
            with gr.Row():
                kind = gr.Dropdown(choices, value=choices[0] if choices else None, label="Adapter", min_width=120)
                detect = gr.Dropdown(slots.how_seen(), value=slots.BY_KIND, label="The picture is", min_width=160)
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
    made = Compare(core, settings, what, image, kind, detect, kinds, scales, seeds, words, grid)
    wire(made, client, go, cancel)
    return made


def wire(own: Compare, client: Any, go: Any, cancel: Any) -> None:
    async def start(values: dict[Any, Any], request: gr.Request) -> actions.Updates:
        cells, owner = await aside(own.cells, values), owner_of(request, values[client])
        if (before := own.running.pop(owner, None)) is not None:
            before.stop(own.core)
        own.running[owner] = Comparison(owner, cells, int(values[own.seeds]))
        while len(own.running) > MOST:
            own.running.pop(next(iter(own.running))).stop(own.core)
        async for update in own.follow(own.running[owner]):
            yield update

    def stop(own_client: str | None, request: gr.Request) -> None:
        if (running := own.running.get(owner_of(request, own_client))) is not None:
            running.stop(own.core)

    go.click(start, own.inputs | {client}, own.shown, **QUIET)
    cancel.click(stop, client, None, **QUIET)
