"""Examples of *Create*: pictures whose recipes hold all that they need. A click makes one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.studio.core import Core

from . import actions
from .events import QUIET, aside, owner_of
from .output import STILL

FILES = sorted((Path(__file__).parents[1] / "examples").glob("*.png"))


def row(core: Core) -> Any:
    shown = [(core.shown(file), actions.shown_recipe(str(file)).prompt) for file in FILES]
    label = "Examples: a click makes one"
    return gr.Gallery(shown, label=label, columns=len(FILES), height=170, elem_id="create-examples", **STILL)


def wire(part: Any, creating: Any, client: Any) -> None:
    """
    Args:
        creating: the tab, of `create.Create`.
    """
    core, out = creating.core, creating.out

    async def make(values: dict[Any, Any], event: gr.SelectData, request: gr.Request) -> actions.Updates:
        recipe = actions.shown_recipe(str(FILES[event.index]))
        yield await aside(creating.filled, recipe) | {part: gr.update(selected_index=None)}
        asked, owner = await aside(actions.asked_of, core, recipe), owner_of(request, values[client])
        async for update in actions.run(core, out, asked, owner, values[out.gallery], False):
            yield update

    shown = [part, *creating.fillable, *out.parts]
    part.select(make, {client, out.gallery}, shown, **QUIET)
