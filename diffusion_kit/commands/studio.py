"""`diffusion-kit studio`: the web pages, a dashboard over any table, users, and the ledger's tables as SQL."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path
from typing import Any

from .console import note
from .execution import add_execution, level_of
from .remembering import add_history

PASSWORD = "DIFFUSION_KIT_PASSWORD"  # for scripts, which nobody can be asked
NEEDS = "the studio needs gradio: pip install 'diffusion_kit[studio]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="dashboard | adduser USERS NAME | sql",
        help="a live dashboard over a table; a user for --auth; SQL that makes the ledger's tables. Without, the studio",
    )
    add = parser.add_argument_group("the studio").add_argument
    add(
        "--models",
        metavar="PATH",
        action="append",
        default=[],
        help="folder of models, a model, or a hub id; repeatable",
    )
    add("--controls", metavar="PATH", action="append", default=[], help="folder of controls, or a control; repeatable")
    add("--output", metavar="FOLDER", help="for pictures and uploads; by default ~/.diffusion_kit/studio")
    add("--queue", type=int, default=32, metavar="N", help="jobs that wait or run at most (32)")
    add("--megapixels", type=float, default=4.0, metavar="MP", help="of a picture that is made, at most (4)")
    served = parser.add_argument_group("where it is served").add_argument
    served("--host", default="127.0.0.1", help="by default this machine alone; others need --auth")
    served("--port", type=int, default=7860)
    served("--auth", metavar="USERS", help="file of users with hashed passwords, as adduser writes it")
    served(
        "--allow-host", metavar="NAME", action="append", default=[], help="name under which it is reached; repeatable"
    )
    served("--root-path", default="", metavar="/PATH", help="under which a proxy shows it")
    served("--upload", type=float, default=20.0, metavar="MB", help="of a file that is given, at most (20)")
    board = parser.add_argument_group("a dashboard").add_argument
    board("--table", metavar="NAME")
    board("--x", metavar="COLUMN")
    board("--y", metavar="COLUMN[,COLUMN]")
    board("--every", type=float, default=60.0, metavar="SECONDS", help="between two looks (60)")
    board("--kind", choices=("bar", "line", "scatter"), default="bar", help="of chart")
    board("--source", metavar="URL", help="of SQLite, Postgres or Supabase; by default SUPABASE_URL, else the history")
    add_execution(parser)
    add_history(parser)


def run(options: argparse.Namespace) -> None:
    match options.what:
        case []:
            studio(options)
        case ["dashboard"]:
            dashboard(options)
        case ["adduser", file, name]:
            add_user(Path(file), name)
        case ["sql"]:
            from diffusion_kit.ledger.sql import script

            print(script(), end="")
        case _:
            raise ValueError(f"studio {' '.join(options.what)}: there are dashboard, adduser USERS NAME and sql")


def studio(options: argparse.Namespace) -> None:
    from diffusion_kit.ledger.place import home
    from diffusion_kit.studio.config import StudioConfig

    config = StudioConfig(
        models=tuple(options.models) or ("default",),
        controls=tuple(options.controls),
        output=Path(options.output).absolute() if options.output else home() / "studio",
        **served(options),
        queue=options.queue,
        megapixels=options.megapixels,
        device=options.device,
        dtype=options.dtype,
        optimize=level_of(options),
        engine=options.engine,
        low_memory=bool(options.low_memory),
        history=not options.no_history,
    )
    config.check()
    server().serve(config, note)


def server() -> Any:
    """
    Raises:
        ImportError: the extra is not installed; says how it is.
    """
    try:
        from diffusion_kit.studio import server
    except ModuleNotFoundError as error:
        if error.name in ("gradio", "uvicorn", "fastapi"):
            raise ImportError(NEEDS) from None
        raise
    return server


def served(options: argparse.Namespace) -> dict[str, Any]:
    """Where it listens, and to whom."""
    users = None if options.auth is None else Path(options.auth)
    own: dict[str, Any] = {
        "host": options.host,
        "port": options.port,
        "users": users,
        "hosts": tuple(options.allow_host),
    }
    return own | {"root_path": options.root_path, "upload": options.upload}


def dashboard(options: argparse.Namespace) -> None:
    for name in ("table", "x", "y"):
        if not getattr(options, name):
            raise ValueError(f"a dashboard needs --{name}")
    if options.every <= 0:
        raise ValueError(f"--every is {options.every}; it must be more than 0 seconds")
    from diffusion_kit.studio.config import StudioConfig

    config = StudioConfig(**served(options))
    config.check()
    ys = [part.strip() for part in options.y.split(",") if part.strip()]
    server().serve_dashboard(config, options.table, options.x, ys, options.every, options.kind, options.source, note)


def add_user(file: Path, name: str) -> None:
    from diffusion_kit.studio.access import add_user

    password = os.environ.get(PASSWORD)
    if password is None:
        if not sys.stdin.isatty():
            raise ValueError(f"there is no terminal to ask for a password: set {PASSWORD}")
        password = getpass.getpass(f"password of {name}: ")
        if getpass.getpass("again: ") != password:
            raise ValueError("the two passwords differ")
    add_user(file, name, password)
    print(f"{name} may use a studio with --auth {file}")
