"""Pictures: written by whoever makes them, searched by `diffusion-kit history` and the studio."""

from __future__ import annotations

import hashlib
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from diffusion_kit.recipes import Recipe

from .database import upsert
from .tables import Picture, PictureControl

STUDIO, API, GENERATE, RUN = "studio", "api", "generate", "run"  # sources
HIGHEST = 5  # rating
TOO_LARGE = 100_000  # characters of a recipe (embedded pictures), which stays in the picture's file alone


def id_of(file: Path) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"file://{socket.gethostname()}{file.absolute()}").hex


def add(session: Session, file: Path, recipe: Recipe, source: str, made: datetime | None = None) -> None:
    """Writes a picture with its recipe. What the user said of another picture under this name is not said of this one."""
    recipe = Recipe.from_json(recipe.to_json())  # as its file gives it: 7 is 7.0 there
    text = recipe.to_json()
    row = {
        "task": task_of(recipe),
        **{name: getattr(recipe, name) for name in ("prompt", "negative_prompt", "model", "seed", "steps")},
        **{name: getattr(recipe, name) for name in ("guidance_scale", "width", "height")},
        "recipe": text if len(text) <= TOO_LARGE else None,
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }
    controls = [
        {
            "position": k,
            "kind": control.kind,
            "detect": control.detect,
            "scale": ":".join(map(str, control.scale)) if isinstance(control.scale, tuple) else str(control.scale),
            **{name: getattr(control, name) for name in ("start", "end", "mode")},
        }
        for k, control in enumerate(recipe.controls)
    ]
    _write(session, file, row | {"source": source, "made": made or datetime.now(UTC)}, controls)


def sheet(file: Path, config: dict[str, Any], run: str, step: int) -> dict[str, Any]:
    """The row of a sheet of pictures that a run of this configuration made to validate itself."""
    with Image.open(file) as picture:
        width, height = picture.size
    row = {"task": "validation", "model": config["base"]["model"], "width": width, "height": height}
    row |= {"prompt": " / ".join(config["validation"]["prompts"]) or f"{file.stem} pictures"}
    row |= {"digest": f"{run} {step} {file.name}", "source": RUN, "run_id": run, "step": step}
    return row | {"made": datetime.fromtimestamp(file.stat().st_mtime, UTC)}


def add_sheet(session: Session, file: Path, row: dict[str, Any]) -> None:
    _write(session, file, row, [])


def _write(session: Session, file: Path, row: dict[str, Any], controls: list[dict[str, Any]]) -> None:
    own = id_of(file)
    row = clean(row | {"id": own, "host": socket.gethostname(), "file": str(file.absolute())})
    session.execute(delete(Picture).where(Picture.id == own, Picture.digest != row["digest"]))
    upsert(session, Picture, [row])
    session.execute(delete(PictureControl).where(PictureControl.picture_id == own))
    upsert(session, PictureControl, [clean(control | {"picture_id": own}) for control in controls])


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Texts without zeros and halves of characters, which Postgres refuses."""
    return {
        name: value.replace("\0", "").encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def task_of(recipe: Recipe) -> str:
    if recipe.image is None:
        return "text-to-image"
    return "image-to-image" if recipe.mask is None else "inpainting"


@dataclass(frozen=True)
class Query:
    """What is searched for; all of it must fit.

    Attributes:
        words: each stands in the prompt, the tags or the name of the file.
        control, model, source: as they are called, or a part of it.
        run: id of a run.
        rating: at least.
        folders: the files lie on this machine, below one of them.
    """

    words: str = ""
    control: str = ""
    model: str = ""
    source: str = ""
    run: str = ""
    rating: int = 0
    favourite: bool = False
    since: datetime | None = None
    folders: tuple[str, ...] = ()

    def clause(self) -> ColumnElement[bool]:
        places = (Picture.prompt, Picture.tags, Picture.file)
        parts = [or_(*(place.icontains(word, autoescape=True) for place in places)) for word in self.words.split()]
        if self.control:
            own = PictureControl.picture_id == Picture.id
            parts.append(exists().where(own, PictureControl.kind.icontains(self.control, autoescape=True)))
        if self.model:
            parts.append(Picture.model.icontains(self.model, autoescape=True))
        for column, value in ((Picture.source, self.source), (Picture.run_id, self.run)):
            parts += [column == value] if value else []
        parts += [Picture.rating >= self.rating] if self.rating else []
        parts += [Picture.favourite.is_(True)] if self.favourite else []
        parts += [Picture.made >= self.since] if self.since is not None else []
        if self.folders:  # not by LIKE, which knows no case
            begins = [func.substr(Picture.file, 1, len(own) + 1) == f"{own}/" for own in self.folders]
            parts += [Picture.host == socket.gethostname(), or_(*begins)]
        return and_(True, *parts)


def search(session: Session, query: Query, *, limit: int, offset: int = 0) -> Sequence[Picture]:
    """The pictures that fit, the newest first."""
    own = select(Picture).where(query.clause()).order_by(Picture.made.desc(), Picture.id)
    return session.scalars(own.limit(limit).offset(offset)).all()


def count(session: Session, query: Query) -> int:
    return session.scalar(select(func.count()).select_from(Picture).where(query.clause())) or 0


def get(session: Session, picture: str) -> Picture | None:
    return session.get(Picture, picture)


def mark(
    session: Session,
    ids: Sequence[str],
    *,
    favourite: bool | None = None,
    rating: int | None = None,
    tags: str | None = None,
) -> None:
    """Writes what the user says of pictures; None leaves it as it is.

    Raises:
        ValueError: a rating that is none.
    """
    if rating is not None and not 0 <= rating <= HIGHEST:
        raise ValueError(f"rating is {rating}; it must be 0 to {HIGHEST}")
    given = {"favourite": favourite, "rating": rating, "tags": None if tags is None else " ".join(tags.split())}
    values = {name: value for name, value in given.items() if value is not None}
    if values:
        session.execute(update(Picture).where(Picture.id.in_(ids)).values(clean(values)))


def forget(session: Session, ids: Sequence[str]) -> None:
    """Drops rows; files are the caller's."""
    session.execute(delete(Picture).where(Picture.id.in_(ids)))
