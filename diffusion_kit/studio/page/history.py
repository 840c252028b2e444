"""*History*: every picture that was made, found again by its words, controls, model and marks."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gradio as gr

from diffusion_kit.ledger import pictures
from diffusion_kit.ledger.tables import Picture
from diffusion_kit.recipes import Recipe, read
from diffusion_kit.studio.core import Core
from diffusion_kit.studio.thumbs import Thumbs

from . import actions
from .events import QUIET, telling, told
from .output import SHOWN, STILL

NAME = "history"
PAGE = 36  # pictures at once
MOST = 1000  # pictures in a zip
HOUR = 3600.0
SURE = "(id) => (id && confirm('Delete this picture, with its file?') ? id : '')"
DAYS = {"any time": None, "today": 1, "last 7 days": 7, "last 30 days": 30}
ANY = "any"
SOURCES = [ANY, pictures.STUDIO, pictures.API, pictures.GENERATE, pictures.RUN]


@dataclass
class History:
    core: Core
    words: Any
    control: Any
    model: Any
    source: Any
    days: Any
    rating: Any
    favourite: Any
    page: Any
    count: Any
    gallery: Any
    ids: Any
    chosen: Any
    picture: Any
    about: Any
    marked: Any
    stars: Any
    tags: Any
    zip: Any
    buttons: tuple[Any, ...]  # that send it to other tabs: its settings, itself to start from, itself to be repainted

    @property
    def filters(self) -> list[Any]:
        return [self.words, self.control, self.model, self.source, self.days, self.rating, self.favourite]

    @property
    def thumbs(self) -> Thumbs:
        return Thumbs(self.core.config.output / "thumbs")

    def query(self, values: Mapping[Any, Any]) -> pictures.Query:
        """What fits; where others are, of what the studio made."""
        days, config = DAYS[values[self.days]], self.core.config
        return pictures.Query(
            words=values[self.words] or "",
            control=values[self.control] or "",
            model=values[self.model] or "",
            source="" if values[self.source] == ANY else values[self.source],
            rating=int(values[self.rating]),
            favourite=bool(values[self.favourite]),
            since=None if days is None else datetime.now(UTC) - timedelta(days=days),
            folders=(str(config.pictures.absolute()), str(config.pictures.resolve())) if config.is_shared else (),
        )

    def found(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Updates that show a page of what fits."""
        query, page = self.query(values), max(1, int(values[self.page] or 1))
        with self.core.ledger.reading() as session:
            count = pictures.count(session, query)
            pages = max(1, -(-count // PAGE))
            page = min(page, pages)
            rows = pictures.search(session, query, limit=PAGE, offset=(page - 1) * PAGE)
        small = self.thumbs.of(rows)
        shown = [(row, file) for row, file in zip(rows, small, strict=True) if file is not None]
        lost = len(rows) - len(shown)
        words = f"{count} pictures, page {page} of {pages}" + (f"; {lost} files are gone" if lost else "")
        return {
            self.count: words,
            self.gallery: gr.update(value=[(str(file), caption(row)) for row, file in shown], selected_index=None),
            self.ids: [row.id for row, _ in shown],
        }

    def shown(self, id: str) -> dict[Any, Any]:
        """Updates that show one picture."""
        row = self.row(id)
        return {
            self.chosen: id,
            self.picture: self.core.shown(Path(row.file)) if is_here(row) else None,
            self.about: described(row),
            self.marked: row.favourite,
            self.stars: row.rating,
            self.tags: row.tags,
        }

    def row(self, id: str | None) -> Picture:
        """
        Raises:
            gr.Error: there is none; or others are here, and the studio did not make it.
        """
        with self.core.ledger.reading() as session:
            row = pictures.get(session, id or "")
        if row is None:
            raise gr.Error("pick a picture first")
        if self.core.config.is_shared and not self.is_own(row):
            raise gr.Error("this picture was not made by the studio: look for it at the machine")
        return row

    def is_own(self, row: Picture) -> bool:
        """Whether the studio made it."""
        return is_here(row) and Path(row.file).resolve().is_relative_to(self.core.config.pictures.resolve())

    def file(self, id: str | None) -> Path:
        """
        Raises:
            gr.Error: as of `row`; or it lies on another machine, and a file of its name here is something else.
        """
        row = self.row(id)
        if not is_here(row):
            raise gr.Error(f"this picture lies on {row.host}")
        return Path(row.file)

    def mark(self, id: str | None, **said: Any) -> None:
        if id:
            row = self.row(id)
            with self.core.ledger.writing() as session:
                pictures.mark(session, [row.id], **said)

    def zipped(self, values: Mapping[Any, Any]) -> str:
        """A zip of all that fits and lies here, the newest first; those of an hour ago are removed."""
        query = self.query(values)
        with self.core.ledger.reading() as session:
            count, rows = pictures.count(session, query), pictures.search(session, query, limit=MOST)
        files = [Path(row.file) for row in rows if is_here(row) and Path(row.file).is_file()]
        if not files:
            raise gr.Error("no picture fits")
        if len(files) < count:
            gr.Warning(f"the zip holds {len(files)} of {count} pictures: the newest {MOST}, of those that are here")
        folder = self.core.config.output / "zips"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > HOUR:
                shutil.rmtree(old, ignore_errors=True)
        out = Path(tempfile.mkdtemp(dir=folder)) / f"pictures-{datetime.now():%Y%m%d-%H%M%S}.zip"
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for k, file in enumerate(files, 1):
                archive.write(file, f"{k:04}-{file.name}")
        return str(out)

    def deleted(self, id: str | None) -> dict[Any, Any]:
        """Removes a picture's file with what was made of it, and its row; where others are, only what the studio made.

        Args:
            id: empty, if the user thought better of it.
        """
        if not id:
            return {self.about: gr.skip()}
        file, row = self.file(id), self.row(id)
        own = self.is_own(row)
        made = [*self.thumbs.all_of(row), *([] if own else [self.core.copy_of(file)])]
        made += file.parent.glob(f"controls/{file.stem}-*.png") if own else []
        for one in (file, *made):
            one.unlink(missing_ok=True)
        with self.core.ledger.writing() as session:
            pictures.forget(session, [row.id])
        return {self.chosen: "", self.picture: None, self.about: "", self.marked: False, self.stars: 0, self.tags: ""}


def is_here(row: Picture) -> bool:
    """Whether its file lies on this machine."""
    return row.host == socket.gethostname()


def caption(row: Picture) -> str:
    return f"{'♥' * row.favourite}{'★' * row.rating} {row.prompt}".strip()[:120]


def described(row: Picture) -> str:
    head = f"{row.file}\n{row.made.astimezone():%Y-%m-%d %H:%M}, {row.source}\n\n"
    if not is_here(row):
        return f"{head}{row.prompt}\n\nit lies on {row.host}"
    try:
        recipe = read(row.file)
    except ValueError:
        return head + row.prompt
    return head + recipe.describe()


def tab(core: Core) -> History:
    with gr.Row():
        words = gr.Textbox(
            label="Search", placeholder="words of the prompt, tags, file", elem_id=f"{NAME}-words", scale=3
        )
        control = gr.Textbox(label="Control", elem_id=f"{NAME}-control", min_width=90)
        model = gr.Textbox(label="Model", min_width=90)
        source = gr.Dropdown(SOURCES, value=ANY, label="Made by", min_width=90)
        days = gr.Dropdown(list(DAYS), value="any time", label="When", min_width=90)
        rating = gr.Slider(0, pictures.HIGHEST, 0, step=1, label="Stars, at least", min_width=90)
        favourite = gr.Checkbox(False, label="Favourites", min_width=90)
    with gr.Row():
        count = gr.Markdown(elem_id=f"{NAME}-count")
        page = gr.Number(1, label="Page", precision=0, minimum=1, elem_id=f"{NAME}-page", min_width=80, scale=0)
        refresh = gr.Button("Look again", size="sm", elem_id=f"{NAME}-refresh", min_width=80, scale=0)
        pack = gr.Button("Zip of all that fit", size="sm", min_width=80, scale=0, elem_id=f"{NAME}-pack")
        zipped = gr.File(label="Zip", visible=False, interactive=False)
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            gallery = gr.Gallery(show_label=False, columns=6, height=640, elem_id=f"{NAME}-gallery", **STILL)
        with gr.Column(scale=4, min_width=320):
            picture = gr.Image(label="Picture", type="filepath", elem_id=f"{NAME}-picture", height=360, **SHOWN)
            with gr.Row():
                marked = gr.Checkbox(False, label="Favourite", elem_id=f"{NAME}-favourite", min_width=80)
                stars = gr.Slider(0, pictures.HIGHEST, 0, step=1, label="Stars", elem_id=f"{NAME}-stars", min_width=80)
                tags = gr.Textbox(label="Tags", elem_id=f"{NAME}-tags", min_width=120)
            with gr.Row():
                create = gr.Button("Settings to Create", size="sm", elem_id=f"{NAME}-to-create", min_width=80)
                start = gr.Button("Start from it", size="sm", elem_id=f"{NAME}-to-start", min_width=80)
                inpaint = gr.Button("Repaint it", size="sm", elem_id=f"{NAME}-to-inpaint", min_width=80)
                delete = gr.Button("Delete", size="sm", variant="stop", elem_id=f"{NAME}-delete", min_width=80)
            about = gr.Textbox(label="How it was made", lines=12, interactive=False, elem_id=f"{NAME}-about")
    # Sent by the page with each event, as its other parts are: tags are of the picture beside which they were written.
    ids, chosen = gr.State([]), gr.Textbox(visible="hidden")
    made = History(
        core,
        words,
        control,
        model,
        source,
        days,
        rating,
        favourite,
        page,
        count,
        gallery,
        ids,
        chosen,
        picture,
        about,
        marked,
        stars,
        tags,
        zipped,
        (create, start, inpaint),
    )
    wire(made, refresh, pack, delete)
    return made


def wire(own: History, refresh: Any, pack: Any, delete: Any) -> None:
    inputs, found = {*own.filters, own.page}, telling(own.found)
    look = [own.count, own.gallery, own.ids]
    shown = [own.chosen, own.picture, own.about, own.marked, own.stars, own.tags]
    gr.on([part.change for part in own.filters], lambda: 1, None, own.page, **QUIET).then(found, inputs, look, **QUIET)
    gr.on([own.page.submit, own.page.input, refresh.click], found, inputs, look, **QUIET)

    def pick(ids: list[str], event: gr.SelectData) -> dict[Any, Any]:
        return own.shown(ids[event.index])

    own.gallery.select(telling(pick), own.ids, shown, **QUIET)
    marks: list[tuple[list[Any], Any, Any]] = [  # each writes its own: the others may have been changed elsewhere
        ([own.marked.input], lambda id, value: own.mark(id, favourite=value), own.marked),
        ([own.stars.release], lambda id, value: own.mark(id, rating=int(value)), own.stars),
        ([own.tags.submit, own.tags.blur], lambda id, value: own.mark(id, tags=value), own.tags),
    ]
    for events, write, part in marks:
        gr.on(events, telling(write), [own.chosen, part], None, **QUIET).then(found, inputs, look, **QUIET)
    delete.click(telling(own.deleted), own.chosen, shown, js=SURE, **QUIET).then(found, inputs, look, **QUIET)
    pack.click(telling(own.zipped), inputs, own.zip, **QUIET).then(
        lambda: gr.update(visible=True), None, own.zip, **QUIET
    )


def recipe_of(file: Path) -> Recipe:
    """
    Raises:
        gr.Error: it has none.
    """
    with told():
        return actions.shown_recipe(str(file))
