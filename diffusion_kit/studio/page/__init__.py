"""The page: tabs over one queue and one model."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.studio.core import Core

from . import actions, compare, create, doodle, history, inpaint, runs
from .events import QUIET, telling
from .pictures import painted

TABS = ("create", "doodle", "inpaint", "compare", "runs", "history")
HERE = Path(__file__).parent
# The secret that a browser keeps, made at its first visit; by itself, so that it is there before the first click.
NEW_CLIENT = "(own) => own ?? [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16)).join('')"


def look() -> dict[str, str]:
    """Its style and its keys, which are part of the page."""
    script = (HERE / "page.js").read_text("utf-8")
    return {"css": (HERE / "page.css").read_text("utf-8"), "head": f"<script>{script}</script>"}


def build(core: Core) -> gr.Blocks:
    secret = stored_secret(core.config.output / ".browser")
    with gr.Blocks(title="diffusion_kit studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        client = gr.BrowserState(None, storage_key="diffusion-kit-client", secret=secret)
        jobs = {name: gr.BrowserState(None, storage_key=f"diffusion-kit-{name}", secret=secret) for name in TABS[:3]}
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                creating = create.tab(core, client, jobs["create"])
            with gr.Tab("Doodle", id="doodle"):
                drawing = doodle.tab(core, client, jobs["doodle"])
            with gr.Tab("Inpaint", id="inpaint"):
                painting = inpaint.tab(core, client, jobs["inpaint"])
            with gr.Tab("Compare", id="compare"):
                comparing = compare.tab(core, client)
            with gr.Tab("Runs", id="runs") as runs_tab:
                running = runs.tab(core)
            with gr.Tab("History", id="history") as history_tab:
                past = history.tab(core)
        dropped = gr.File(label="restore", file_types=[".png", ".webp", ".jpg"], elem_id="restore", type="filepath")
        drafted: dict[str, Any] = {
            create.NAME: creating,
            doodle.NAME: drawing,
            inpaint.NAME: painting,
            compare.NAME: comparing,
        }
        first = blocks.load(None, client, client, js=NEW_CLIENT, **QUIET)
        for name, own in drafted.items():
            keep_draft(blocks, gr.BrowserState(None, storage_key=f"diffusion-kit-draft-{name}", secret=secret), own)
        for own in (creating, drawing, painting):
            first.then(actions.resume(core, own.out), [own.out.job, client], own.out.parts, **QUIET)
        first.then(comparing.resume, client, comparing.shown, **QUIET)
        runs_tab.select(running.looked, running.chosen, running.parts, **QUIET)
        for look in (first.then, history_tab.select):  # with the page already, so that the tab opens with its pictures
            look(telling(past.found), {*past.filters, past.page}, [past.count, past.gallery, past.ids], **QUIET)
        sending(core, past, creating, painting, tabs)
        dropped.upload(restored(creating, tabs, dropped), dropped, [tabs, dropped, *creating.fillable], **QUIET)
    return blocks


def keep_draft(blocks: gr.Blocks, draft: Any, tab: Any) -> None:
    """What is written and chosen in a tab stays in the browser; a page that is loaded again shows it."""
    parts = tab.drafted
    blocks.load(
        lambda saved: saved if saved and len(saved) == len(parts) else [gr.skip()] * len(parts), draft, parts, **QUIET
    )
    gr.on([part.change for part in parts], None, parts, draft, js="(...values) => [values]", **QUIET)


def restored(creating: create.Create, tabs: Any, dropped: Any) -> Any:
    """A picture that was dropped on the page shows its settings in Create."""

    def fill(file: str) -> dict[Any, Any]:
        try:
            recipe = actions.shown_recipe(file)
        except ValueError:
            gr.Warning("this picture carries no recipe of the kit: nothing is restored")
            return {dropped: None}  # so that the next one is taken
        return creating.filled(recipe) | {tabs: gr.Tabs(selected=create.NAME), dropped: None}

    return fill


def sending(core: Core, past: history.History, creating: create.Create, painting: inpaint.Inpaint, tabs: Any) -> None:
    """From History to the other tabs."""
    to_create, to_start, to_inpaint = past.buttons

    def settings(id: str | None) -> dict[Any, Any]:
        return creating.filled(history.recipe_of(past.file(id))) | {tabs: gr.Tabs(selected="create")}

    def start(id: str | None) -> dict[Any, Any]:
        return {
            creating.image: painted(past.file(id).read_bytes()),
            creating.starts: True,
            tabs: gr.Tabs(selected="create"),
        }

    def repaint(id: str | None) -> dict[Any, Any]:
        return {painting.canvas: painted(past.file(id).read_bytes()), tabs: gr.Tabs(selected="inpaint")}

    to_create.click(telling(settings), past.chosen, [tabs, *creating.fillable], **QUIET)
    to_start.click(telling(start), past.chosen, [tabs, creating.image, creating.starts], **QUIET)
    to_inpaint.click(telling(repaint), past.chosen, [tabs, painting.canvas], **QUIET)


def stored_secret(file: Path) -> str:
    """The key of what browsers keep, the same after a restart."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as beside:  # its owner's alone
            beside.write(secrets.token_hex(16))
        os.replace(beside.name, file)
    return file.read_text("ascii")
