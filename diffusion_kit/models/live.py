"""How many bytes of tensors live at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts, inside the block, the bytes of tensors that live at once.

    torch's own MemTracker hangs on hooks of modules, which the executor's networks do not call.

    Attributes:
        now: bytes that live at the moment.
        peak: most bytes at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known` were there before, and do not count."""
        super().__init__()
        self.held = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return
        self.held.add(key)
        weakref.finalize(storage, self.gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def gone(self, key: int, size: int) -> None:
        self.held.discard(key)
        self.now -= size
