"""A node of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Tree(BaseModel):
    """A node: an unknown key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
