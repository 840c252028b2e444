"""The studio under load: a queue of 32, 20 clients, 200 requests on the embedded model, by its HTTP interface.

python scripts/verify_load.py [REQUESTS]

A client that is refused comes again until it is served. Every picture is read back and belongs to its request. Beside it a
plain loop over the same pipeline, in a process of its own, before and after. Prints JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_kit.recipes import Recipe, read

CLIENTS, AT_ONCE, REQUESTS, QUEUE = 20, 2, 200, 32  # two requests of a client at once: more than the queue takes
STEPS = 10
WORDS = ("a horse", "a house", "a tree", "a cat", "a boat", "a cup", "a bird", "an apple")
SERIAL = """
import json, sys, time, torch
from pathlib import Path
from diffusion_kit import AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained("default")
pipe.set_progress_bar_config(disable=True)
words = sys.argv[4:]
def one(k):
    noise = torch.Generator().manual_seed(k)
    made = pipe(f"{words[k % len(words)]} {k}", num_inference_steps=int(sys.argv[2]), guidance_scale=2.5, generator=noise)
    made.images[0].save(Path(sys.argv[3]) / f"{k}.png")
one(0)
start = time.perf_counter()
for k in range(int(sys.argv[1])):
    one(k)
print(int(sys.argv[1]) / (time.perf_counter() - start))
"""


def serial(count: int, folder: str) -> float:
    """Pictures a second of a plain loop that saves them."""
    out = subprocess.run(
        [sys.executable, "-c", SERIAL, str(count), str(STEPS), folder, *WORDS],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(out.stdout.split()[-1])


@contextmanager
def studio(folder: str) -> Iterator[str]:
    """A studio in a process of its own; its address."""
    port, home = free_port(), Path(folder, "home")
    call = [sys.executable, "-m", "diffusion_kit.cli", "studio", "--port", str(port), "--queue", str(QUEUE)]
    server = subprocess.Popen(call, env={**os.environ, "DIFFUSION_KIT_HOME": str(home)}, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            time.sleep(0.2)
            try:
                urllib.request.urlopen(f"{url}/api/v1/health").read()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit("the studio ended")
        yield url
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        content = answer.read()
    return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content


def memory(url: str) -> int:
    lines = dict(line.rsplit(" ", 1) for line in call(f"{url}/api/v1/metrics").decode().splitlines())
    return int(lines["diffusion_kit_memory_bytes"])


class Load:
    """Clients that share a list of requests."""

    def __init__(self, url: str, folder: Path, requests: int) -> None:
        self.url, self.folder, self.requests = url, folder, requests
        self.todo, self.lock = list(range(requests)), threading.Lock()
        self.waits: list[float] = []
        self.refused, self.wrong, self.memory = 0, list[str](), dict[int, int]()

    def client(self) -> None:
        while True:
            with self.lock:
                if not self.todo:
                    return
                k = self.todo.pop(0)
            asked = time.monotonic()
            self.served(k, asked)

    def file(self, k: int) -> Path:
        return self.folder / f"{k}.png"

    def check(self) -> None:
        """Reads back prompt and seed of every picture."""
        for k in range(self.requests):
            recipe, body = read(self.file(k)), self.body(k)
            if not isinstance(recipe, Recipe) or (recipe.prompt, recipe.seed) != (body["prompt"], body["seed"]):
                self.wrong.append(f"request {k} got {recipe}")

    def body(self, k: int) -> dict[str, Any]:
        return {"prompt": f"{WORDS[k % len(WORDS)]} {k}", "seed": 1000 + k, "steps": STEPS}

    def served(self, k: int, asked: float) -> None:
        while True:
            try:
                job = call(f"{self.url}/api/v1/pictures", self.body(k))
                break
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                with self.lock:
                    self.refused += 1
                time.sleep(float(error.headers["Retry-After"]))
        while job["state"] in ("queued", "running"):
            job = call(f"{self.url}/api/v1/jobs/{job['id']}?wait=30")
        self.file(k).write_bytes(call(f"{self.url}/api/v1/jobs/{job['id']}/picture"))
        with self.lock:
            self.waits.append(time.monotonic() - asked)
            if len(self.waits) in (40, self.requests):
                self.memory[len(self.waits)] = memory(self.url)


def main() -> None:
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else REQUESTS
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "served").mkdir()
        before = serial(requests // 4, folder)
        with studio(folder) as url:
            call(
                f"{url}/api/v1/jobs/{call(f'{url}/api/v1/pictures', {'prompt': 'warm', 'steps': STEPS})['id']}?wait=60"
            )
            load = Load(url, Path(folder, "served"), requests)
            clients = [threading.Thread(target=load.client) for _ in range(CLIENTS * AT_ONCE)]
            start = time.monotonic()
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            rate = requests / (time.monotonic() - start)
        load.check()
        after = serial(requests // 4, folder)
    alone = statistics.mean([before, after])
    waits = sorted(load.waits)
    grown = load.memory.get(requests, 0) / load.memory[40] if 40 in load.memory else 1.0
    figures = {
        "requests": requests,
        "clients": CLIENTS,
        "requests_of_a_client_at_once": AT_ONCE,
        "queue": QUEUE,
        "served": len(load.waits),
        "refused_and_came_again": load.refused,
        "pictures_of_another_request": len(load.wrong),
        "pictures_a_second": round(rate, 3),
        "of_a_serial_loop": [round(before, 3), round(after, 3)],
        "share_of_a_serial_loop": round(rate / alone, 3),
        "wait_p50": round(waits[len(waits) // 2], 1),
        "wait_p95": round(waits[int(0.95 * len(waits))], 1),
        "memory_after_40": load.memory.get(40),
        "memory_after_all": load.memory.get(requests),
    }
    passed = {
        "all are served": len(load.waits) == requests,
        "each picture belongs to its request": not load.wrong,
        "at least .9 of a serial loop": rate / alone >= 0.9,
        "memory grows by 5 % at most": grown <= 1.05,
    }
    print(json.dumps(figures | {"passed": passed}))


if __name__ == "__main__":
    main()
