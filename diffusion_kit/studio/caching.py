"""What browsers may keep of the studio's pictures."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DAY = 86400  # seconds


class Caching:
    """Lets a browser keep files of gradio's cache, each of which lies under the hash of its bytes and so never changes: a
    page that is loaded again, or another tab, need not ask for a screen of small pictures anew.

    Args:
        folder: of that cache.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.mark = app, f"file={folder}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def kept(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                MutableHeaders(scope=message)["cache-control"] = f"private, max-age={DAY}"
            await send(message)

        is_cached = scope["type"] == "http" and self.mark in scope["path"]
        await self.app(scope, receive, kept if is_cached else send)
