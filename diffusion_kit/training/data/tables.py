"""Training pictures in tables of `datasets`: Arrow files, which stay on disk, and Parquet, of which it makes such files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_kit.training.config import SourceConfig

from .sources import Content, Record, Source, size_of


@dataclass(frozen=True)
class Table:
    """Rows, each read when it is asked for; nothing is decoded.

    Attributes:
        rows: a `datasets.Dataset` in the format "arrow".
        folder: what paths in columns are relative to.
    """

    rows: Any
    path: Path
    folder: Path
    settings: SourceConfig

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        (row,), own = self.rows[index].to_pylist(), self.settings
        name = f"{self.path.name} row {index}"
        image, condition = (self._content(row.get(column)) for column in (own.image, own.condition))
        return Record(name, image or Path(name), condition, captions_of(row.get(own.caption)), size_of(row))

    def _content(self, value: Any) -> Content | None:
        """An image column holds bytes or a path, or both by their names."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self.folder / value
        return value if isinstance(value, bytes) else None


def open_table(settings: SourceConfig) -> Source:
    """A folder saved with `save_to_disk`, a folder of .arrow or .parquet files, or one such file.

    Raises:
        ImportError: `datasets` is not installed. ValueError: no readable table, no rows, or a column that is not there.
    """
    path = Path(settings.path).expanduser()
    rows = _rows(path)
    for field in ("image", "condition", "caption"):
        column = getattr(settings, field)
        if (field == "image" or is_named(settings, field)) and column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise ValueError(f"{path} has no column {column!r}; it has {known}: set {field}=NAME")
    if not len(rows):
        raise ValueError(f"{path} has no rows")
    wanted = {settings.image, settings.condition, settings.caption, "width", "height"}
    rows = rows.select_columns([column for column in rows.column_names if column in wanted])
    return Table(rows.with_format("arrow"), path, path if path.is_dir() else path.parent, settings)


def _rows(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(f'{path} is read by datasets, which is missing: pip install "diffusion_kit[data]"') from None
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs is in the error, too
    tables, arrows = ([path] if path.suffix == end else sorted(path.rglob(f"*{end}")) for end in (".parquet", ".arrow"))
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if arrows:
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in arrows])
        return datasets.Dataset.from_parquet([str(file) for file in tables])
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path} cannot be read as a table of datasets: {why}") from None


def is_named(settings: SourceConfig, field: str) -> bool:
    """Whether a column is another than the default, and so has to be there."""
    return bool(getattr(settings, field) != SourceConfig.model_fields[field].default)


def captions_of(value: Any) -> tuple[str, ...]:
    """A text, a list of texts, or nothing."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text for text in texts if isinstance(text, str)) or ("",)
