"""What every tab does with its parts: asks for pictures, cancels, makes again, goes on after a reload."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.making.job import Job as Wanted
from diffusion_kit.recipes import FileRef, Recipe, read
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.queue import DONE, Full, Job
from diffusion_kit.studio.requests import Asked, check_detector, settings_of

from .events import QUIET, aside, owner_of
from .output import Output

Ask = Callable[[Mapping[Any, Any]], Asked]
Updates = AsyncIterator[dict[Any, Any]]


def wire(core: Core, out: Output, client: Any, go: Any, inputs: set[Any], ask: Ask, *, measured: bool = False) -> None:
    """What the buttons of a tab do.

    Args:
        go: starts; `ask` makes of the values of `inputs` what is asked for.
    """

    async def start(values: dict[Any, Any], request: gr.Request) -> Updates:
        asked = await aside(ask, values)
        async for update in run(core, out, asked, owner_of(request, values[client]), values[out.gallery], measured):
            yield update

    async def repeat(values: dict[Any, Any], request: gr.Request, *, vary: bool) -> Updates:
        asked = await aside(lambda: asked_of(core, shown_recipe(values[out.file])))
        if vary:
            asked = replace(asked, seed=secrets.randbelow(2**32))
        async for update in run(core, out, asked, owner_of(request, values[client]), values[out.gallery], measured):
            yield update

    async def again(values: dict[Any, Any], request: gr.Request) -> Updates:
        async for update in repeat(values, request, vary=False):
            yield update

    async def vary(values: dict[Any, Any], request: gr.Request) -> Updates:
        async for update in repeat(values, request, vary=True):
            yield update

    def note(id: str | None, own_client: str | None, request: gr.Request) -> None:
        job = core.queue.find(id or "", owner_of(request, own_client))
        if job is not None and not job.over.done():
            gr.Info("a picture is being made: what is asked for now is made next")

    # What is asked for while a picture is made is made after it, the last of it: gradio would drop it without a word.
    go.click(note, [out.job, client], None, trigger_mode="multiple", **QUIET)
    go.click(start, inputs | {client, out.gallery}, out.parts, trigger_mode="always_last", **QUIET)
    out.again.click(again, {client, out.gallery, out.file}, out.parts, **QUIET)
    out.vary.click(vary, {client, out.gallery, out.file}, out.parts, **QUIET)
    out.cancel.click(cancelling(core), [out.job, client], None, **QUIET)
    out.gallery.select(picking(out), None, out.parts, **QUIET)


def cancelling(core: Core) -> Callable[..., None]:
    def cancel(id: str | None, client: str | None, request: gr.Request) -> None:
        job = core.queue.find(id or "", owner_of(request, client))
        if job is not None:
            core.queue.cancel(job)

    return cancel


def picking(out: Output) -> Callable[..., dict[Any, Any]]:
    def pick(event: gr.SelectData) -> dict[Any, Any]:
        file = Path(event.value["image"]["path"]).resolve()
        if not file.is_relative_to(out.core.config.output.resolve()):
            raise gr.Error("this is no picture of the studio")
        return out.showing(file)

    return pick


async def awaited(submit: Callable[[], Job]) -> Any:
    """What a job gives, which is not kept for anybody else.

    Raises:
        gr.Error: it gives nothing, in one line.
    """
    try:
        job = submit()
    except Full as error:
        raise gr.Error(str(error), title="busy") from None
    await asyncio.wait({asyncio.wrap_future(job.over)})
    if job.state != DONE:
        raise gr.Error(job.error or f"it was {job.state}", title="not like this")
    result, job.result = job.result, None
    return result


async def run(core: Core, out: Output, asked: Asked, owner: str, gallery: list[Any] | None, measured: bool) -> Updates:
    try:
        job = core.submit(asked, owner, watched=True, measured=measured)
    except Full as error:
        raise gr.Error(str(error), title="busy") from None
    async for update in out.follow(job, gallery):
        yield update


def resume(core: Core, out: Output) -> Callable[..., Updates]:
    """What a page that is loaded again does: it follows the job that its browser asked for last."""

    async def follow(id: str | None, client: str | None, request: gr.Request) -> Updates:
        yield {out.progress: gr.skip()}  # gradio empties what a handler says nothing of
        job = core.queue.find(id or "", owner_of(request, client))
        if job is not None:
            async for update in out.follow(job, []):
                yield update

    return follow


def shown_recipe(file: str | None) -> Recipe:
    """
    Raises:
        ValueError: no picture is shown, or it has no recipe.
    """
    if not file or not Path(file).is_file():
        raise ValueError("make a picture first, or pick one")
    recipe = read(file)
    if not isinstance(recipe, Recipe):
        raise ValueError("this picture was made by another program: its settings are not known exactly")
    return recipe


def asked_of(core: Core, recipe: Recipe) -> Asked:
    """The same picture again; what is embedded in the recipe is kept as a file, which a command can name.

    Raises:
        ValueError: the recipe, which may be anybody's, names files of this machine.
    """

    def kept(ref: FileRef | None) -> FileRef | None:
        if ref is not None and ref.data is not None:
            return core.inputs.add(ref.data, ref.path)
        if ref is not None and not core.config.is_own(ref.path):
            raise ValueError(f"{ref.path} is no picture of this studio: give it again in Create")
        return ref

    for control in recipe.controls:
        check_detector(control.detect or "none")

    model = core.library.model(recipe.model)
    settings = replace(
        settings_of(core.config, model),
        negative_prompt=recipe.negative_prompt,
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        scheduler=recipe.scheduler,
        size=(recipe.width, recipe.height),
        strength=recipe.strength,
        fit=recipe.fit,
    )
    controls = tuple(
        replace(own, hash=None, detect=own.detect or "none", image=kept(own.image) or own.image, mask=kept(own.mask))
        for own in recipe.controls
    )
    return Asked(Wanted("", recipe.prompt, kept(recipe.image), kept(recipe.mask), controls), settings, recipe.seed)
