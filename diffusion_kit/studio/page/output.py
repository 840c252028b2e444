"""What comes of a job: progress, preview, picture, control images, and what can be done with them."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.recipes import Recipe, read
from diffusion_kit.studio import words
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.queue import CANCELLED, DONE, FAILED, QUEUED, Job
from diffusion_kit.studio.workshop import Result

GLANCE = 0.25  # seconds between two looks at a job
BUTTONS = ["download", "fullscreen"]  # none that sends a picture elsewhere
MOST = 24  # pictures of the page's gallery
PLAIN: dict[str, Any] = {"interactive": False, "buttons": BUTTONS}
SHOWN = {**PLAIN, "elem_classes": "studio-picture"}  # of a picture, however small it is
STILL = {
    **PLAIN,
    "object_fit": "contain",
    "fit_columns": False,
    "allow_preview": False,
    "elem_classes": "studio-row",
}  # of rows of small ones


@dataclass
class Output:
    """Parts of a tab that show what comes of its jobs.

    Attributes:
        job: id of the last job, kept by the browser: a page that is loaded again follows it.
        file: of the picture that is shown.
    """

    core: Core
    job: Any
    file: Any
    progress: Any
    picture: Any
    shown: Any
    about: Any
    command: Any
    python: Any
    gallery: Any
    cancel: Any
    again: Any
    vary: Any

    @property
    def parts(self) -> list[Any]:
        """That change while a job is followed."""
        names = ("job", "file", "progress", "picture", "shown", "about", "command", "python", "gallery")
        return [getattr(self, name) for name in names]

    async def follow(self, job: Job, gallery: list[Any] | None) -> AsyncIterator[dict[Any, Any]]:
        """Updates until the job is over."""
        yield {self.job: job.id, self.progress: bar(self.core, job)}
        last = None
        while not job.over.done():
            await asyncio.sleep(GLANCE)
            update: dict[Any, Any] = {self.progress: bar(self.core, job)}
            if job.preview is not None and job.preview is not last:
                update[self.picture] = last = job.preview
            yield update
        yield self.end(job, gallery)

    def end(self, job: Job, gallery: list[Any] | None) -> dict[Any, Any]:
        update: dict[Any, Any] = {self.progress: bar(self.core, job)}
        if job.state == DONE and isinstance(job.result, Result) and job.result.file.is_file():
            files = [
                str(job.result.file),
                *(own[0] if isinstance(own, (tuple, list)) else own for own in gallery or ()),
            ]
            update |= self.showing(job.result.file) | {self.gallery: files[:MOST]}
            update[self.shown] = [str(file) for file in job.result.shown]
            update |= {self.command: job.result.command, self.python: job.result.python}
        elif job.preview is not None:
            update[self.picture] = job.preview
        return update

    def showing(self, file: Path) -> dict[Any, Any]:
        """Updates that show a picture that there is."""
        update = {self.file: str(file), self.picture: str(file)}
        recipe = read(file)
        if not isinstance(recipe, Recipe):
            return update | {self.about: "", self.command: "", self.python: "", self.shown: []}
        update |= {self.about: recipe.describe(), self.command: words.command(recipe)}
        beside = sorted(file.parent.glob(f"controls/{file.stem}-*.png"))
        return update | {self.python: "", self.shown: [str(own) for own in beside]}  # Python needs the loaded controls


def output(core: Core, tab: str, job: Any) -> Output:
    progress = gr.HTML(elem_id=f"{tab}-progress", padding=False)
    picture = gr.Image(label="Picture", elem_id=f"{tab}-picture", type="filepath", height=420, **SHOWN)
    with gr.Row():
        cancel = gr.Button("Cancel (Esc)", variant="stop", size="sm", elem_id=f"{tab}-cancel", min_width=80)
        again = gr.Button("Again", size="sm", elem_id=f"{tab}-again", min_width=80)
        vary = gr.Button("Vary", size="sm", elem_id=f"{tab}-vary", min_width=80)
    shown = gr.Gallery(label="As the controls saw it", columns=5, height=160, elem_id=f"{tab}-shown", **STILL)
    gallery = gr.Gallery(label="Made on this page", columns=5, height=200, elem_id=f"{tab}-gallery", **STILL)
    with gr.Accordion("How it was made", open=False):
        about = gr.Textbox(show_label=False, lines=6, interactive=False, elem_id=f"{tab}-about", container=False)
        command = gr.Code(label="As a command", language="shell", elem_id=f"{tab}-command", interactive=False)
        python = gr.Code(label="As Python", language="python", elem_id=f"{tab}-python", interactive=False)
    file = gr.State(None)
    return Output(core, job, file, progress, picture, shown, about, command, python, gallery, cancel, again, vary)


def bar(core: Core, job: Job) -> str:
    """Progress as a bar with a line of words, for screen readers too."""
    share = job.done / job.of if job.of else 0.0
    if job.state == FAILED:
        return f'<p class="studio-error" role="alert">{html.escape(job.error or "it failed")}</p>'
    words = said(core, job)
    value = 100 if job.state == DONE else round(100 * share)
    told = job.result.told if isinstance(job.result, Result) else ()
    return (
        f'<div class="studio-bar" role="progressbar" aria-valuenow="{value}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="{words}" data-state="{job.state}"><div style="width:{value}%"></div></div>'
        f'<p class="studio-words" aria-live="polite">{words}</p>'
        + "".join(f'<p class="studio-told">{html.escape(line)}</p>' for line in told)
    )


def said(core: Core, job: Job) -> str:
    if job.state == QUEUED:
        return f"waiting, {core.queue.position(job)} before it"
    if job.state == DONE:
        seconds = (job.ended or 0.0) - (job.began or 0.0)
        return f"done in {seconds:.1f} s"
    if job.state == CANCELLED:
        return f"cancelled at {job.done} of {job.of}" if job.of else "cancelled"
    if job.cancelling.is_set():
        return "cancelled as soon as the step at hand is done"
    if not job.of:
        return f"getting ready, {time.monotonic() - (job.began or job.asked):.0f} s"
    left = job.seconds_left
    return f"step {job.done} of {job.of}" + ("" if left is None else f", {left:.0f} s left")
