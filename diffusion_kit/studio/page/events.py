"""How handlers of a page's events run: as whom, where, and what is told of what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import gradio as gr
from anyio import to_thread

from diffusion_kit.studio.core import FORESEEN, explain

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of events: the page shows its own


def owner_of(request: gr.Request, client: str | None) -> str:
    """The user; where there are none, the browser, by the secret that it keeps."""
    user = getattr(request.request.state, "user", "") if request.request is not None else ""
    return str(user) or f"browser {client}"


@contextmanager
def told() -> Iterator[None]:
    """Errors that a user can cause stand on the page in their line."""
    try:
        yield
    except FORESEEN as error:
        raise gr.Error(explain(error), title="not like this", print_exception=False) from None


def telling(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def own(*values: Any, **more: Any) -> Any:
        with told():
            return handler(*values, **more)

    return own


async def aside(work: Callable[..., Any], *values: Any) -> Any:
    """What reads and writes pictures, in a thread: the event loop serves all pages."""
    with told():
        return await to_thread.run_sync(work, *values)
