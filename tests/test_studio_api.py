"""The HTTP interface: pictures that belong to their requests, and attacks that are refused."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import lines, needs, picture
from PIL import Image
from starlette.testclient import TestClient

from diffusion_kit.cli import main
from diffusion_kit.ledger import pictures
from diffusion_kit.recipes import Recipe, read
from diffusion_kit.studio.access import add_user
from diffusion_kit.studio.config import StudioConfig

needs("gradio")

from diffusion_kit.studio import api  # noqa: E402
from diffusion_kit.studio.server import make_app  # noqa: E402

OWN, API = "http://127.0.0.1:7860", "/api/v1"
SIZE = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def studio(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    config = StudioConfig(
        models=(str(model),), controls=(str(model / "more"),), output=tmp_path_factory.mktemp("studio"), upload=0.2
    )
    with TestClient(make_app(config), base_url=OWN) as client:
        client.config = config  # type: ignore[attr-defined]
        yield client


def encoded(image: Image.Image, form: str = "PNG") -> str:
    data = io.BytesIO()
    image.save(data, form)
    return base64.b64encode(data.getvalue()).decode()


def finished(studio: TestClient, **body: Any) -> dict[str, Any]:
    answer = studio.post(f"{API}/pictures", json={**SIZE, **body})
    assert answer.status_code == 202, answer.text
    state = answer.json()
    while state["state"] in ("queued", "running"):
        state = studio.get(f"{API}/jobs/{state['id']}", params={"wait": 5}).json()
    return dict(state)


def test_a_picture_belongs_to_its_request(studio: TestClient, tmp_path: Path) -> None:
    state = finished(studio, prompt="a red fox", seed=11, negative_prompt="blue", guidance_scale=3.0)
    assert state["state"] == "done", state["error"]
    file = tmp_path / "a.png"
    file.write_bytes(studio.get(f"{API}/jobs/{state['id']}/picture").content)
    recipe = read(file)
    assert isinstance(recipe, Recipe)
    assert (recipe.prompt, recipe.seed, recipe.negative_prompt, recipe.guidance_scale) == ("a red fox", 11, "blue", 3.0)
    assert (state["result"]["width"], state["result"]["seed"], state["done"]) == (64, 11, 2)
    assert main(["generate", "--again", str(file), "--out", str(tmp_path / "again.png")]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(file)))


def test_what_the_kit_warns_of_is_told(studio: TestClient) -> None:
    result = finished(studio, prompt="a fox " * 60)["result"]
    assert any("the prompt was cut after" in told for told in result["warnings"])
    assert finished(studio, prompt="a fox")["result"]["warnings"] == []


def test_controls_and_inpainting(studio: TestClient) -> None:
    controls = [
        {"kind": "canny", "image": encoded(picture(size=96))},
        {"kind": "net", "image": encoded(lines()), "detect": "none", "scale": 0.5, "mask": encoded(lines())},
    ]
    state = finished(
        studio, prompt="a fox", controls=controls, image=encoded(picture(), "JPEG"), mask=encoded(lines(), "WEBP")
    )
    assert state["state"] == "done", state["error"]
    assert state["result"]["controls"] == 2
    shown = studio.get(f"{API}/jobs/{state['id']}/controls/2")
    assert np.asarray(Image.open(io.BytesIO(shown.content))).max() == 255
    assert studio.get(f"{API}/jobs/{state['id']}/controls/3").status_code == 404


def test_every_picture_is_in_the_history(studio: TestClient) -> None:
    finished(studio, prompt="an otter in the history", seed=1)
    core: Any = studio.app.state.core  # type: ignore[attr-defined]
    with core.recorder.ledger.reading() as session:
        (row,) = pictures.search(session, pictures.Query(words="otter history"), limit=9)
        assert (row.source, row.seed) == (pictures.API, 1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "guidance_scale": "nan"}, "guidance_scale"),
        ({"prompt": "a", "model": "/etc"}, "no model '/etc' here"),
        ({"prompt": "a", "mask": encoded(lines())}, "a mask needs the picture"),
        ({"prompt": "a", "width": 8192, "height": 8192}, "4 megapixels at most"),
        ({"prompt": "a", "width": 64, "height": None}, "width and height, or neither"),
        ({"prompt": "a", "image": "file:///etc/passwd"}, "files and URLs are not followed"),
        ({"prompt": "a", "image": "http://127.0.0.1:1/x.png"}, "files and URLs are not followed"),
        ({"prompt": "a", "image": "/etc/passwd"}, "files and URLs are not followed"),
        ({"prompt": "a", "image": base64.b64encode(b"<svg onload=alert(1)>").decode()}, "image"),
        ({"prompt": "a", "image": base64.b64encode(bytes(300_000)).decode()}, "0.2 MB"),
        (
            {"prompt": "a", "controls": [{"kind": "canny", "image": encoded(lines()), "detect": "canny:/etc/x"}]},
            "alone",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(studio: TestClient, body: dict[str, Any], told: str) -> None:
    own = {key: value for key, value in {**SIZE, **body}.items() if value is not None}
    answer = studio.post(f"{API}/pictures", json=own)
    assert answer.status_code == 422
    assert told in str(answer.json()["detail"])


def test_what_is_no_request_is_told_in_a_line_without_its_pictures(studio: TestClient) -> None:
    for body, told in (
        ({"prompt": "a", "steps": 0, "image": "A" * 5000}, "steps: Input should be greater than or equal to 1"),
        ({"image": "A" * 5000}, "prompt: Field required"),
        ({"prompt": "a", "stpes": 3}, "stpes: Extra inputs are not permitted"),
    ):
        answer = studio.post(f"{API}/pictures", json=body)
        assert answer.status_code == 422
        assert answer.json() == {"detail": told}


def test_what_only_the_model_knows_fails_in_a_line(studio: TestClient) -> None:
    body = {"kind": "/etc/passwd", "image": encoded(lines()), "detect": "none"}
    state = finished(studio, prompt="a", controls=[body])
    assert state["state"] == "failed"
    assert "no control '/etc/passwd' here; there are canny, net" in state["error"]
    state = finished(studio, prompt="a", scheduler="NoScheduler")
    assert state["state"] == "failed"
    assert "no scheduler 'NoScheduler'" in state["error"]


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "data", [bomb(), b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(40), b"%PDF-1.4", b"", b"RIFF1234WEBP"]
)
def test_hostile_uploads_are_refused(studio: TestClient, data: bytes) -> None:
    body = {"prompt": "a", **SIZE, "image": base64.b64encode(data).decode()}
    answer = studio.post(f"{API}/pictures", json=body)
    assert answer.status_code == 422
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/jobs/..%2F..%2Fetc%2Fpasswd/picture",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=file:///etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=https://example.com/x.png",
        "/gradio_api/file=https%3A%2F%2Fexample.com/x.png",
        "/static/..%2f..%2f..%2f..%2fetc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/theme.css/..%2f..%2fetc/passwd",
    ],
)
def test_files_outside_are_not_served(studio: TestClient, path: str) -> None:
    answer = studio.get(path)
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text


def test_the_page_takes_no_path_for_an_upload(studio: TestClient) -> None:
    """Nor copies it to where files are served from."""
    page = studio.get("/config").json()
    kinds = {own["id"]: own["type"] for own in page["components"]}
    event = next(own for own in page["dependencies"] if [kinds[part] for part in own["inputs"]] == ["file"])
    given = {"path": "/etc/passwd", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [given], "fn_index": event["id"], "session_hash": "attack"}
    assert studio.post("/gradio_api/queue/join", json=body).status_code == 200
    told = studio.get("/gradio_api/queue/data", params={"session_hash": "attack"}).text
    assert '"success":false' in told
    assert "root:" not in told
    assert not list(studio.config.output.rglob("passwd"))  # type: ignore[attr-defined]


def test_what_is_uploaded_is_no_page_of_the_studio(studio: TestClient) -> None:
    """It would run with the rights of whoever follows a link to it."""
    for name in ("evil.html", "evil.svg"):
        answer = studio.post("/gradio_api/upload", files={"files": (name, b"<script>alert(1)</script>")})
        (path,) = answer.json()
        got = studio.get(f"/gradio_api/file={path}")
        assert got.status_code == 403 or got.headers["content-disposition"].startswith("attachment")


def test_a_browser_keeps_pictures_and_nothing_else(studio: TestClient) -> None:
    """Under a name that is the hash of their bytes they never change; no proxy keeps them."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    (path,) = studio.post("/gradio_api/upload", files={"files": ("a.png", data.getvalue())}).json()
    got = studio.get(f"/gradio_api/file={path}")
    assert (got.status_code, got.headers["cache-control"]) == (200, "private, max-age=86400")
    for other in ("/", f"/gradio_api/file={path}x", f"{API}/health"):
        assert "max-age=86400" not in studio.get(other).headers.get("cache-control", "")


def test_nothing_is_fetched_for_the_page(studio: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import safehttpx

    async def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    for name in ("get", "async_validate_url"):
        monkeypatch.setattr(safehttpx, name, asked)
    page = studio.get("/config").json()
    kinds = {own["id"]: own["type"] for own in page["components"]}
    event = next(own for own in page["dependencies"] if [kinds[part] for part in own["inputs"]] == ["file"])
    given = {"path": "https://example.com/a.png", "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [given], "fn_index": event["id"], "session_hash": "fetch"}
    studio.post("/gradio_api/queue/join", json=body)
    told = studio.get("/gradio_api/queue/data", params={"session_hash": "fetch"}).text
    assert '"success":false' in told
    assert "the network was asked" not in told


def test_links_of_other_pages_lead_to_the_page_alone(studio: TestClient) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert studio.get("/", headers=elsewhere).status_code == 200
    for path in ("/config", f"{API}/models", "/gradio_api/info"):
        assert studio.get(path, headers=elsewhere).status_code == 403


def test_waiting_pages_leave_the_processor_to_the_pictures(studio: TestClient) -> None:
    """Gradio's own pace is a thousand looks a second, each in the way of the thread that makes pictures."""
    page = next(own.app for own in studio.app.routes if hasattr(getattr(own, "app", None), "get_blocks"))  # type: ignore[attr-defined]
    assert page.get_blocks()._queue.sleep_when_free >= 0.02


def test_the_page_and_the_interface_refuse_foreign_pages(studio: TestClient) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for path in ("/", "/config", f"{API}/models", f"{API}/openapi.json", "/gradio_api/info"):
            assert studio.get(path, headers=headers).status_code == 403
        assert studio.post("/gradio_api/queue/join", headers=headers, json={}).status_code == 403


def test_the_page_names_no_other_host(studio: TestClient) -> None:
    """Scripts, styles and fonts are the studio's own: the page works on a machine without a network."""
    text = studio.get("/").text
    assert "diffusion_kit studio" in text
    for start in ("<script src=", '<link rel="stylesheet" href=', "@import"):
        for part in text.split(start)[1:]:
            assert not part.lstrip("\"'(url").startswith(("http", "//")), part[:80]


def test_detection_on_the_same_queue(studio: TestClient) -> None:
    answer = studio.post(f"{API}/detect", json={"detector": "canny", "image": encoded(picture(size=96))})
    assert answer.status_code == 200
    assert Image.open(io.BytesIO(answer.content)).size == (96, 96)
    answer = studio.post(f"{API}/detect", json={"detector": "cany", "image": encoded(picture())})
    assert answer.status_code == 422
    assert "did you mean 'canny'" in answer.json()["detail"]


def test_health_metrics_and_what_may_be_picked(studio: TestClient) -> None:
    finished(studio, prompt="a fox")
    health = studio.get(f"{API}/health").json()
    assert health["alive"] is True
    assert health["queue"] == 32
    text = studio.get(f"{API}/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(counts['diffusion_kit_jobs_total{state="done"}']) >= 1
    assert int(counts["diffusion_kit_memory_bytes"]) > 10**7
    found = studio.get(f"{API}/models").json()
    assert list(found["controls"]) == ["net"]
    assert "canny" in found["detectors"]


def test_a_job_is_cancelled_and_the_others_go_on(studio: TestClient) -> None:
    first, second = (
        studio.post(f"{API}/pictures", json={**SIZE, "prompt": "a", "steps": steps}).json() for steps in (400, 2)
    )
    assert studio.delete(f"{API}/jobs/{first['id']}").status_code == 200
    for job, state in ((first, "cancelled"), (second, "done")):
        assert studio.get(f"{API}/jobs/{job['id']}", params={"wait": 30}).json()["state"] == state
    assert studio.get(f"{API}/jobs/{first['id']}/picture").status_code == 409


def test_one_users_job_is_no_other_users(model: Path, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        add_user(tmp_path / "users", name, f"password of {name}")
    config = StudioConfig(models=(str(model),), output=tmp_path / "studio", users=tmp_path / "users")
    with TestClient(make_app(config), base_url=OWN) as client:
        ann, bob = (("ann", "password of ann"), ("bob", "password of bob"))
        assert client.get(f"{API}/health").status_code == 200
        assert client.get("/").status_code == client.get(f"{API}/models").status_code == 401
        assert client.get("/", auth=ann).status_code == 200
        job = client.post(f"{API}/pictures", json={**SIZE, "prompt": "a", "steps": 300}, auth=ann).json()
        where = f"{API}/jobs/{job['id']}"
        assert client.delete(where, auth=bob).status_code == client.get(where, auth=bob).status_code == 404
        assert client.get(where, auth=ann).json()["state"] in ("queued", "running")
        assert client.delete(where, auth=ann).status_code == 200
        for _ in range(100):
            if client.get(where, auth=ann).json()["state"] == "cancelled":
                break
            time.sleep(0.1)
        assert client.get(where, auth=ann).json()["state"] == "cancelled"


def test_a_full_queue_is_429(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudioConfig(models=(str(model),), output=tmp_path / "studio", queue=2)
    with TestClient(make_app(config), base_url=OWN) as client:
        body = {**SIZE, "prompt": "a", "steps": 300}
        jobs = [client.post(f"{API}/pictures", json=body) for _ in range(3)]
        assert [job.status_code for job in jobs] == [202, 202, 429]
        assert int(jobs[2].headers["retry-after"]) >= 1
        assert "the queue is full (2 jobs)" in jobs[2].json()["detail"]
        full = client.post(f"{API}/pictures", json={**body, "image": encoded(picture())})
        assert full.status_code == 429
        assert not (tmp_path / "studio" / "inputs").exists(), "nothing is kept of what is not taken"
        monkeypatch.setattr(api, "LONGEST_WAIT", 0.1)
        client.delete(f"{API}/jobs/{jobs[1].json()['id']}")
        late = client.post(f"{API}/detect", json={"detector": "canny", "image": encoded(picture())})
        assert (late.status_code, "cancelled" in late.json()["detail"]) == (504, True)
        assert len(client.app.state.core.queue) == 1, "it waits no more"  # type: ignore[attr-defined]
        for job in jobs[:2]:
            client.delete(f"{API}/jobs/{job.json()['id']}")
