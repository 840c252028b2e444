"""Contenders in processes of their own that run in turn, so that a busy machine is as busy for one as for the other."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .cases import Case
from .contenders import CONTENDERS, CONVERTING, absent, scratch

REFERENCE = "diffusers"  # what others are compared with
WATCH = 0.005  # seconds between looks at the memory
PATIENCE = 3600.0  # seconds for an answer, a compilation included
PRODUCTS = 20  # of which the fastest is the machine's peak
DIED = "its process "  # how the reason begins of one that another run may not have


@dataclass
class Row:
    """What a contender did in a case.

    Attributes:
        seconds: of each timed run, in the order of the rounds.
        steps: seconds of a step in each of them, without what comes before a run's second step where that is known.
        flops, operations: of one run, as torch dispatches them; None where another runtime does the work.
        peak, anonymous: bytes of the process from loading to the end of its first run, with and without pages of files.
        card: bytes that torch held of a card's memory at most, in the same time; None without one.
        converting: the peak where networks were converted, too, before they were on disk; None where nothing is.
        error: relative difference of its latents from the reference's, in the 2-norm.
        absent: why there is nothing else.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    ready: float = 0.0
    flops: int | None = None
    operations: int | None = None
    peak: int = 0
    anonymous: int = 0
    card: int | None = None
    converting: int | None = None
    error: float | None = None
    absent: str | None = None


def compare(case: Case, names: Sequence[str], folder: Path, rounds: int) -> list[Row]:
    """Every contender's row; the runs of a round follow one another, first forwards and then backwards.

    Contenders are loaded one after another and stay loaded, so all of them must fit into memory.
    """
    rows = {name: Row(name, absent=absent(name, case)) for name in names}
    subjects = {name: Subject(name, case, folder) for name, row in rows.items() if row.absent is None}
    latents: dict[str, Tensor] = {}
    try:

        def ask(name: str, what: str) -> dict[str, Any]:
            """An answer that is of use; without one the contender is out."""
            answer = subjects[name].ask(what)
            if "absent" in answer:
                rows[name].absent = answer["absent"]
                latents.pop(name, None)
                subjects.pop(name).stop()
            return answer

        for name in list(subjects):
            threads = case.threads if name.endswith(" aoti") else "any"  # which a conversion is for
            done = scratch() / f"{name} {threads}"  # by another case of the same networks
            if name.endswith(CONVERTING) and not done.exists():
                rows[name].converting = ask(name, "load").get("peak")
                if name not in subjects:
                    continue
                done.touch()
                subjects[name].stop()
                subjects[name] = Subject(name, case, folder)
            answer = ask(name, "load")
            if name in subjects:
                latents[name] = answer.pop("latents")
                vars(rows[name]).update(answer)
        for number in range(rounds):
            order = list(subjects)
            for name in order if number % 2 == 0 else reversed(order):
                answer = ask(name, "run")
                rows[name].seconds += answer.get("seconds", [])
                rows[name].steps += answer.get("steps", [])
    finally:
        for subject in subjects.values():
            subject.stop()
    if REFERENCE in latents:
        reference = latents[REFERENCE]
        for name, own in latents.items():
            rows[name].error = float((own - reference).norm() / reference.norm())
    return list(rows.values())


class Subject:
    """A contender in its process."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        with threads_of(case):
            self.process = context.Process(target=serve, args=(other, name, case, folder), daemon=True)
            self.process.start()
        other.close()
        self.name = name

    def ask(self, what: str) -> dict[str, Any]:
        try:
            self.line.send(what)
            if not self.line.poll(PATIENCE):
                self.process.kill()
                return {"absent": f"{DIED}gave no answer in {PATIENCE / 60:.0f} minutes"}
            answer: dict[str, Any] = self.line.recv()
        except (EOFError, OSError):
            self.process.join(10)
            self.process.kill()
            self.process.join()
            return {"absent": f"{DIED}ended with {self.process.exitcode}"}
        return answer

    def stop(self) -> None:
        self.line.close()
        self.process.join(10)
        self.process.kill()


@contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """A process that is begun inside has as many threads as the case says, in every library."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(case.threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def serve(line: Connection, name: str, case: Case, folder: Path) -> None:
    """Answers "load" and "run" until nobody asks."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(case.threads)
    run: Any = None
    while True:
        try:
            what = line.recv()
        except EOFError:
            return
        try:
            if what == "load":
                start = time.perf_counter()
                with Memory() as memory:
                    run = CONTENDERS[name](case, folder)
                    latents = run().latents
                ready = time.perf_counter() - start
                card = torch.cuda.max_memory_allocated() if case.device == "cuda" else None
                peaks = {**memory.peaks(), "card": card}
                line.send({"latents": latents, "ready": ready, **peaks, **counted(run, name)})
            else:
                start = time.perf_counter()
                ends = run().ends
                seconds = time.perf_counter() - start
                ends = [] if name.startswith("fast ") else ends  # whose first step is the only whole one
                line.send({"seconds": [seconds], "steps": [step_seconds(seconds, ends, case)]})
        except Exception as error:
            line.send({"absent": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def step_seconds(seconds: float, ends: Sequence[float], case: Case) -> float:
    """Of a run's steps after the first, in which keys and values of the text and much else is made; of the whole run
    where their ends are not known."""
    return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else seconds / case.steps


def attention_flops(query: Any, key: Any, value: Any, *more: Any, out_shape: Any = None, **options: Any) -> int:
    """Of shapes; torch's table lacks its kernel for a CPU."""
    return sdpa_flop_count(query, key, value)


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def counted(run: Any, name: str) -> dict[str, int | None]:
    """Operations and floating-point operations of a run, where torch dispatches them."""
    if not name.endswith(("diffusers", "eager")):
        return {"flops": None, "operations": None}
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, Operations() as operations:
        run()
    return {"flops": flops.get_total_flops(), "operations": operations.number}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class Memory:
    """Watches this process's memory from a thread."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.most, self.most_anonymous, self.over = 0, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.over.wait(WATCH):
            self._look()

    def _look(self) -> None:
        now = self.process.memory_info()
        self.most = max(self.most, now.rss)
        self.most_anonymous = max(self.most_anonymous, now.rss - getattr(now, "shared", 0))

    def peaks(self) -> dict[str, int]:
        """The system's own count of the most, where there is one: no look is too late for it."""
        self._look()
        status = Path("/proc/self/status")
        rows = (line.split() for line in status.read_text().splitlines()) if status.is_file() else ()
        most = next((1024 * int(row[1]) for row in rows if row[0] == "VmHWM:"), self.most)
        return {"peak": most, "anonymous": self.most_anonymous}

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def machine_peak(case: Case) -> float:
    """Most floating-point operations a second that a large product reaches here, by torch or by oneDNN."""
    from diffusion_kit.models import onednn
    from diffusion_kit.pipelines.engines import timed

    dtype, before = getattr(torch, case.dtype), torch.get_num_threads()
    torch.set_num_threads(case.threads)
    size, best = 2048 if case.device == "cpu" else 8192, 0.0
    like: dict[str, Any] = {"dtype": dtype, "device": case.device}
    a, layer = torch.randn(size, size, **like), torch.nn.Linear(size, size, bias=False, **like)
    ways: list[Any] = [layer]
    if case.device == "cpu" and onednn.obstacle(dtype) is None:
        weight = onednn.laid_out(layer, layer.weight.detach())
        ways.append(lambda x: onednn.product(x, weight))
    with torch.no_grad():
        for way in ways:
            for _ in range(PRODUCTS):
                best = max(best, 2 * size**3 / timed(lambda way=way: way(a), a.device))
    torch.set_num_threads(before)
    return best
