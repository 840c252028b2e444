"""What was made for the last few keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """At most `limit` values; the one that was asked for longest ago is forgotten first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.values = limit, OrderedDict[Hashable, T]()

    def __len__(self) -> int:
        return len(self.values)

    def forget(self, which: Callable[[Any], bool]) -> None:
        """Values whose keys are such."""
        for key in [key for key in self.values if which(key)]:
            del self.values[key]

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self.values:
            self.values[key] = make()
        self.values.move_to_end(key)
        while len(self.values) > self.limit:
            self.values.popitem(last=False)
        return self.values[key]
