"""The server: the HTTP interface and the page behind one gate."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing leaves this machine
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import gradio.processing_utils
import gradio.routes
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from . import api, dashboard, page, tables
from .access import Gate, Users
from .caching import Caching
from .config import StudioConfig
from .core import Core

PACE = 0.03  # seconds between two looks for what happened on a page
PAGES, FOLLOWERS = 100, 4  # events that are under way at once: of pages, and of pages for each job of the queue
GRACE = 2  # seconds for what is under way when the server is ended
EVERYWHERE = ("0.0.0.0", "::")  # addresses that are no names
OVERHEAD = 6  # bodies hold several pictures, in base64


async def fetch_nothing(url: str, request: Any = None) -> Any:
    """In place of what gradio does with a URL that a request names: it would show any page of the web as one of the
    studio's own, and download without a limit."""
    raise HTTPException(403, f"nothing is fetched from {url[:100]!r}")


def put(owner: Any, name: str, value: Any) -> None:
    """In place of what gradio has under a name that is its own affair, and may be another in its next version.

    Raises:
        ImportError: it has nothing there: what is put would change nothing, and nobody would know.
    """
    if not hasattr(owner, name):
        raise ImportError(f"this version of gradio ({gr.__version__}) has no {name}: the studio needs 6.31")
    setattr(owner, name, value)


put(gradio.routes, "secure_url_stream_response", fetch_nothing)
put(gradio.processing_utils, "async_ssrf_protected_get", fetch_nothing)


def make_app(config: StudioConfig, say: Callable[[str], None] = print) -> FastAPI:
    """The studio.

    Raises:
        ValueError, FileNotFoundError: a configuration that cannot be used, in one line.
    """
    core = Core(config, say)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        core.close()

    app = bare_app(config, life=life, openapi_url=f"{api.PREFIX}/openapi.json")
    app.state.core = core
    app.include_router(api.router)
    mount(app, page.build(core), config, **page.look())
    return app


def make_dashboard(
    config: StudioConfig, table: str, x: str, ys: Sequence[str], every: float, kind: str, source: str | None
) -> FastAPI:
    """A dashboard.

    Raises:
        ValueError: no such table or column.
    """
    live = dashboard.make_live(tables.open_table(table, source), tables.masked(source or tables.default_source()))
    dashboard.check_columns(live, x, ys)
    app = bare_app(config, openapi_url=None)
    mount(app, dashboard.build(live, x, ys, every, kind), config)
    return app


def bare_app(config: StudioConfig, *, life: Any = None, openapi_url: str | None) -> FastAPI:
    """An app behind its gate; its pages of documentation, which load scripts from elsewhere, are off. What gradio serves
    lies in the studio's own folder from now on."""
    config.check()
    cache = config.output / "cache"
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    users = Users(config.users) if config.users is not None else None
    off: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": openapi_url}
    app = FastAPI(title="diffusion_kit studio", lifespan=life, root_path=config.root_path, **off)
    largest = int(config.upload * 1e6 * OVERHEAD)
    hosts = (*config.hosts, *([] if config.host in EVERYWHERE else [config.host]))
    app.add_exception_handler(RequestValidationError, one_line)
    app.add_middleware(Caching, folder=cache)
    app.add_middleware(Gate, hosts=hosts, root=config.root_path, users=users, largest=largest, open_paths=api.OPEN)
    return app


async def one_line(request: Request, error: Any) -> JSONResponse:
    """What is wrong with a request, as for everything else a line; not the request, in which pictures are."""
    told = [f"{'.'.join(str(part) for part in own['loc'][1:]) or 'body'}: {own['msg']}" for own in error.errors()]
    return JSONResponse({"detail": "; ".join(told)[:1000]}, 422)


def mount(app: FastAPI, blocks: gr.Blocks, config: StudioConfig, **look: Any) -> None:
    """Adds a page at the root."""
    blocks.queue(api_open=False, default_concurrency_limit=None)
    # Else gradio looks for events 1,000 times a second, each time in the way of who makes pictures: a tenth of their speed.
    put(blocks._queue, "sleep_when_free", PACE)
    # Else 40 pages that follow a job would leave no place for anybody's click on Cancel.
    put(blocks._queue, "max_thread_count", PAGES + FOLLOWERS * config.queue)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        root_path=config.root_path or None,
        max_file_size=int(config.upload * 1e6),
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        mcp_server=False,
        pwa=False,
        allowed_paths=[str(folder.absolute()) for folder in config.shown],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        **look,
    )
    # Else gradio takes any path that a request names for a file that was uploaded: of a page that is mounted it does not
    # check where files lie.
    put(blocks, "has_launched", True)


def serve(config: StudioConfig, say: Callable[[str], None] = print) -> None:
    """The studio, until it is interrupted."""
    listen(make_app(config, say), config, say, "the studio")


def serve_dashboard(
    config: StudioConfig,
    table: str,
    x: str,
    ys: Sequence[str],
    every: float,
    kind: str,
    source: str | None,
    say: Callable[[str], None],
) -> None:
    listen(make_dashboard(config, table, x, ys, every, kind, source), config, say, f"the dashboard of {table}")


def listen(app: FastAPI, config: StudioConfig, say: Callable[[str], None], what: str) -> None:
    """
    Raises:
        ValueError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((config.host, config.port))
        except OSError as error:
            raise ValueError(
                f"{config.host} port {config.port} cannot be had: {error.strerror}; --port gives another"
            ) from None
        port = own.getsockname()[1]
        name = f"[{config.host}]" if ":" in config.host else config.host
        say(f"{what} is at http://{name}:{port}{config.root_path}  (Ctrl-C ends it)")
        # Pages that are open hold a connection for as long as they are; that it is cut at the end is nobody's error.
        settings = uvicorn.Config(app, log_level="critical", server_header=False, timeout_graceful_shutdown=GRACE)
        uvicorn.Server(settings).run(sockets=[own])
