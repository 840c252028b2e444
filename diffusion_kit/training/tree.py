"""A node of a configuration, and the values of a whole one by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Tree(BaseModel):
    """A node: an unknown key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings by their dotted names; an empty mapping is a value."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from leaves(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, tree
