"""Who may use the studio: users with hashed passwords, and requests that come from its own pages.

A page of somebody else's may send requests to an address of this machine, and by DNS rebinding give itself a name that
leads here. So every request must name the studio's own host and, where a browser says its page, come from the studio's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from asyncio import sleep
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from anyio import to_thread
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import LOOPBACK

COST = {"n": 2**14, "r": 8, "p": 1}  # of scrypt: 16 MB and about 50 ms
SHORTEST = 8  # characters of a password
WRONG = 0.5  # seconds that a wrong password takes
NOBODY = ""  # who asks, where there are no users


class Users:
    """A file with a user a line: NAME:scrypt:SALT:HASH, in hexadecimal.

    Raises:
        FileNotFoundError: no such file. ValueError: it has no users, or a line of another form.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(
                f"--auth {file}: no such file; `diffusion-kit studio adduser {file} NAME` writes it"
            )
        self.hashes = read_users(file)
        if not self.hashes:
            raise ValueError(f"--auth {file} has no users")
        self.known: dict[bytes, str] = {}  # digests of what was found right: scrypt is slow on purpose
        self.key = secrets.token_bytes(32)

    def named(self, header: str | None) -> str | None:
        """The user of an Authorization header; None where it is missing or wrong."""
        kind, _, text = (header or "").partition(" ")
        if kind.lower() != "basic":
            return None
        digest = hmac.digest(self.key, text.encode(), "sha256")
        if digest not in self.known:
            try:
                name, _, password = base64.b64decode(text, validate=True).decode().partition(":")
            except (binascii.Error, ValueError):
                return None
            if not self.is_right(name, password):
                return None
            self.known[digest] = name
        return self.known[digest]

    def is_right(self, name: str, password: str) -> bool:
        """Takes as long for a name that there is not."""
        salt, digest = self.hashes.get(name, (b"nobody", b""))
        return hmac.compare_digest(hashed(password, salt), digest)


def read_users(file: Path) -> dict[str, tuple[bytes, bytes]]:
    found = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines() if file.is_file() else [], 1):
        if not line.strip():
            continue
        try:
            name, kind, salt, digest = line.split(":")
            found[name] = bytes.fromhex(salt), bytes.fromhex(digest)
        except ValueError:
            kind = ""
        if kind != "scrypt":
            raise ValueError(f"{file} line {number} is no user: `diffusion-kit studio adduser` writes them")
    return found


def add_user(file: Path, name: str, password: str) -> None:
    """Writes a user, or another password for one; nobody but the file's owner can read it.

    Raises:
        ValueError: a name with a colon or a space, a password that is too short.
    """
    if not name or ":" in name or any(c.isspace() for c in name):
        raise ValueError(f"{name!r} is no name of a user: it must have no colon and no space")
    if len(password) < SHORTEST:
        raise ValueError(f"a password has {SHORTEST} characters or more")
    salt = secrets.token_bytes(16)
    users = read_users(file) | {name: (salt, hashed(password, salt))}
    beside = file.with_name(f".{file.name}.part")
    lines = (f"{own}:scrypt:{salt.hex()}:{digest.hex()}\n" for own, (salt, digest) in users.items())
    with open(os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.writelines(lines)
    os.replace(beside, file)


def hashed(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, maxmem=2**26, **COST)


class Gate:
    """Lets through requests to the studio's own names, from its own pages, by its users.

    Args:
        hosts: names, without ports, under which it may be reached beside those of the loopback.
        users: None: everybody.
        open_paths: paths that need no user: whether it is alive.
        largest: bytes of a request's body at most.
        root: path of the page, to which other pages may have links.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str],
        users: Users | None,
        largest: int,
        open_paths: Collection[str] = (),
        root: str = "",
    ) -> None:
        self.roots = {"", "/", root, f"{root}/"}
        self.app, self.users, self.largest, self.open_paths = app, users, largest, set(open_paths)
        self.hosts = {host.lower() for host in (*LOOPBACK, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.stranger(scope, headers) or await self.unknown(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, limited(receive, self.largest), send)

    def stranger(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """What a request is told that is of another host or page, or too large; None where it is the studio's own."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if hostname(host) not in self.hosts:
            return said(403, f"this studio is not called {host!r}: --allow-host adds names")
        if origin is not None and not self.is_own(origin, host):
            return said(403, f"requests from pages of {origin!r} are refused")
        is_link = scope.get("method") in ("GET", "HEAD") and scope["path"] in self.roots
        if headers.get("sec-fetch-site") == "cross-site" and not is_link:
            return said(403, "requests from other pages are refused")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.largest:
            return said(413, f"at most {self.largest / 1e6:g} MB are taken at once")
        return None

    async def unknown(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """What a request is told that is of no user; None where it is of one, whom it then names."""
        scope["state"] = {**scope.get("state", {}), "user": NOBODY}
        if self.users is None or scope["path"] in self.open_paths:
            return None
        user = await to_thread.run_sync(self.users.named, headers.get("authorization"))
        if user is None:
            if "authorization" in headers:
                await sleep(WRONG)
            return said(401, "name and password, please", {"WWW-Authenticate": 'Basic realm="diffusion-kit studio"'})
        scope["state"]["user"] = user
        return None

    def is_own(self, origin: str, host: str) -> bool:
        """Whether a page is the studio's: of the same name and port, or of a name that a proxy shows it under."""
        try:
            found = urlsplit(origin)
        except ValueError:
            return False
        name = (found.hostname or "").lower()
        return found.netloc.lower() == host.lower() or (name in self.hosts and name not in LOOPBACK)


def hostname(host: str) -> str:
    """Without a port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def said(code: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"detail": text}, code, dict(headers or {}))


def limited(receive: Receive, largest: int) -> Receive:
    """A body that says no length is cut off where it becomes too large."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > largest else message

    return counted
