"""A client of the studio's HTTP interface, with types and nothing but Python's own library.

python examples/studio_client.py "a red horse" horse.png [CONTROL_IMAGE]
"""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict


class Result(TypedDict):
    """What became of a picture; `command` and `python` make the same pixels."""

    prompt: str
    seed: int
    width: int
    height: int
    seconds: float
    controls: int
    fidelity: list[dict[str, Any]]
    command: str
    warnings: list[str]
    python: str


class Job(TypedDict):
    """How far a picture is: `state` is queued, running, done, failed or cancelled."""

    id: str
    state: str
    position: int
    done: int
    of: int
    seconds_left: float | None
    error: str | None
    result: Result | None


@dataclass
class Studio:
    """
    Args:
        url: of the studio.
        user: name and password, where it has users.
    """

    url: str = "http://127.0.0.1:7860"
    user: tuple[str, str] | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def __post_init__(self) -> None:
        if self.user is not None:
            secret = base64.b64encode(":".join(self.user).encode()).decode()
            self.headers["Authorization"] = f"Basic {secret}"

    def call(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/v1{path}", data, self.headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bytes(answer.read())

    def ask(self, prompt: str, **settings: Any) -> Job:
        """Asks for a picture, again and again while the queue is full.

        Raises:
            ValueError: what the studio says is wrong.
        """
        while True:
            try:
                job: Job = json.loads(self.call("/pictures", {"prompt": prompt, **settings}))
                return job
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise ValueError(json.loads(error.read())["detail"]) from None
                time.sleep(float(error.headers["Retry-After"]))

    def wait(self, job: Job) -> Job:
        while job["state"] in ("queued", "running"):
            job = json.loads(self.call(f"/jobs/{job['id']}?wait=30"))
        return job

    def picture(self, job: Job) -> bytes:
        """The PNG of a job that is done."""
        return self.call(f"/jobs/{job['id']}/picture")

    def cancel(self, job: Job) -> None:
        self.call(f"/jobs/{job['id']}", method="DELETE")

    def detect(self, detector: str, photo: Path) -> bytes:
        """The control image of a photo, a PNG."""
        return self.call("/detect", {"detector": detector, "image": encoded(photo)})


def encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def main(prompt: str, out: str, control: str | None = None) -> None:
    studio = Studio()
    controls = [] if control is None else [{"kind": "canny", "image": encoded(Path(control)), "guidance": 2.0}]
    job = studio.wait(studio.ask(prompt, controls=controls))
    if job["result"] is None:
        sys.exit(job["error"] or job["state"])
    Path(out).write_bytes(studio.picture(job))
    print(f"{out}, seed {job['result']['seed']}\n{job['result']['command']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
