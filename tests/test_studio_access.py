"""Who may use the studio: its users, from its own pages, under its own name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from diffusion_kit.cli import main
from diffusion_kit.studio import access
from diffusion_kit.studio.access import Gate, Users, add_user, read_users
from diffusion_kit.studio.config import StudioConfig

OWN = "http://127.0.0.1:7860"


async def told(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{request.state.user}:{len(await request.body())}")


def client(**gate: Any) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", told, methods=["GET", "POST", "DELETE"])])
    own: Any = Gate(app, **{"hosts": (), "users": None, "largest": 1000, **gate})
    return TestClient(own, base_url=OWN)


def basic(name: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"}


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(access, "WRONG", 0.0)
    add_user(tmp_path / "users", "ann", "correct horse")
    add_user(tmp_path / "users", "bob", "battery staple")
    return tmp_path / "users"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "[::1", "a@127.0.0.1@b"]
)
def test_foreign_hosts_are_refused(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:7860", "studio.lan"])
def test_own_hosts_are_let_in(host: str) -> None:
    assert client(hosts=["studio.lan"]).get("/", headers={"Host": host}).text == ":0"


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:9999",
        "null",
        "http://localhost:7860.evil.example",
        "file://",
        "http://[x",
    ],
)
def test_foreign_origins_are_refused(origin: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert client().request(method, "/", headers={"Origin": origin}).status_code == 403


def test_its_own_pages_are_let_in_and_those_under_an_allowed_name() -> None:
    assert client().post("/", headers={"Origin": OWN}).status_code == 200
    behind = client(hosts=["studio.example"])
    assert behind.post("/", headers={"Origin": "https://studio.example"}).status_code == 200
    assert client().post("/", headers={"Origin": "https://studio.example"}).status_code == 403


def test_rebound_names_are_refused() -> None:
    """The shape of DNS rebinding: host and origin agree, and both are foreign."""
    same = {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"}
    assert client().post("/", headers=same).status_code == 403


def test_other_pages_may_not_post_without_an_origin() -> None:
    assert client().post("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client().get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200, "a link to it"


def test_bodies_are_limited_with_and_without_a_length() -> None:
    assert client().post("/", content=b"x" * 1001).status_code == 413
    assert client().post("/", content=b"x" * 1000).text == ":1000"
    assert client().post("/", headers={"Content-Length": "-1"}).status_code == 413
    with pytest.raises(ClientDisconnect):
        client().post("/", content=(b"x" * 400 for _ in range(9)))


def test_users_and_wrong_passwords(users: Path) -> None:
    own = client(users=Users(users), open_paths=["/health"])
    assert own.get("/", headers=basic("ann", "correct horse")).text == "ann:0"
    assert own.get("/", headers=basic("bob", "battery staple")).text == "bob:0"
    assert own.get("/health").status_code == 200
    refused = [basic("ann", "battery staple"), basic("eve", "correct horse"), basic("ann", ""), {}]
    refused += [{"Authorization": "Basic !"}, {"Authorization": "Bearer x"}, basic("ann:correct horse", "")]
    for headers in refused:
        answer = own.get("/", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")


def test_passwords_are_hashed_and_the_file_is_its_owners_alone(users: Path) -> None:
    text = users.read_text()
    assert "horse" not in text
    assert "staple" not in text
    assert users.stat().st_mode & 0o077 == 0
    before = read_users(users)
    add_user(users, "ann", "another password")
    after = read_users(users)
    assert after["ann"] != before["ann"]
    assert after["bob"] == before["bob"]
    assert not Users(users).is_right("ann", "correct horse")


def test_users_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "users"
    for name, password in (("a:b", "long enough"), ("a b", "long enough"), ("", "long enough"), ("ann", "short")):
        with pytest.raises(ValueError, match="no name of a user|8 characters"):
            add_user(file, name, password)
    with pytest.raises(FileNotFoundError, match="adduser"):
        Users(file)
    file.write_text("ann:plain:text\n")
    with pytest.raises(ValueError, match="line 1 is no user"):
        Users(file)
    monkeypatch.setenv("DIFFUSION_KIT_PASSWORD", "from a script")
    assert main(["studio", "adduser", str(tmp_path / "new"), "ann"]) == 0
    assert Users(tmp_path / "new").is_right("ann", "from a script")


def test_other_addresses_need_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.5"):
        assert main(["studio", "--host", host]) == 2
        assert "can be reached from other machines: add --auth" in capsys.readouterr().err
    StudioConfig(host="0.0.0.0", users=tmp_path / "users").check()
    for host in ("127.0.0.1", "::1", "localhost"):
        StudioConfig(host=host).check()
