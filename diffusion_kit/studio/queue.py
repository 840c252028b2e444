"""A bounded queue of jobs and the one thread that does them, one after the other: there is one model."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OVER = (DONE, FAILED, CANCELLED)
KEPT = 64  # jobs that are over and may still be asked about
GRACE = 5.0  # seconds for the step at hand when the queue is closed
PACE = 0.3  # weight of the newest job in the mean of their seconds


class Cancelled(Exception):
    """Raised inside a job that was cancelled."""


class Full(Exception):
    """The queue takes no more; it has `length` jobs, and may have room for whoever hears this in `seconds`."""

    def __init__(self, length: int, seconds: float) -> None:
        super().__init__(f"the queue is full ({length} jobs): try again in {max(1, round(seconds))} s")
        self.length, self.seconds = length, seconds


@dataclass(eq=False)
class Job:
    """Work that was asked for, how far it is, and what it gave.

    Attributes:
        owner: who may look at it and cancel it.
        work: given the job, which it tells how far it is; gives the result.
        watched: whether somebody looks at previews.
        done, of: calls of the network.
        preview: the picture so far; that of a cancelled job stays.
        asked, began, ended: seconds of `time.monotonic`.
        over: done when the job is.
    """

    owner: str
    work: Callable[[Job], Any]
    watched: bool = False
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = QUEUED
    done: int = 0
    of: int = 0
    preview: Image.Image | None = None
    result: Any = None
    error: str | None = None
    asked: float = field(default_factory=time.monotonic)
    began: float | None = None
    ended: float | None = None
    cancelling: threading.Event = field(default_factory=threading.Event)
    over: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.over.set_running_or_notify_cancel()  # nobody who waits for it, and is cancelled, cancels it

    def step(self, done: int, of: int, preview: Image.Image | None = None) -> None:
        """Tells how far the job is.

        Raises:
            Cancelled: it is to go no further.
        """
        self.done, self.of = done, of
        self.preview = preview or self.preview
        if self.cancelling.is_set():
            raise Cancelled

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over, at the latest after so many seconds."""
        return bool(wait([self.over], seconds).done)

    @property
    def seconds_left(self) -> float | None:
        """By the pace of its calls so far; None before the first."""
        if self.began is None or not self.done or self.state != RUNNING:
            return None
        return (time.monotonic() - self.began) / self.done * (self.of - self.done)


class Queue:
    """
    Args:
        size: jobs that wait or run at most.
        explain: from an error to the line that a user reads; None for errors that nobody foresaw.
    """

    def __init__(self, size: int, explain: Callable[[Exception], str]) -> None:
        self.size, self.explain = size, explain
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # those that wait, in their order; the first may be running
        self.past: OrderedDict[str, Job] = OrderedDict()
        self.changed = threading.Condition()
        self.pace, self.counts = 1.0, dict.fromkeys(OVER, 0)
        self.outside = 0  # how many were turned away and are thought to come again
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="studio", daemon=True)
        self.thread.start()

    def submit(self, owner: str, work: Callable[[Job], Any], *, watched: bool = False) -> Job:
        """
        Raises:
            Full: it takes no more.
        """
        job = Job(owner, work, watched)
        with self.changed:
            self.check_room()
            self.outside = max(self.outside - 1, 0)
            self.jobs[job.id] = job
            self.changed.notify_all()
        return job

    def check_room(self) -> None:
        """
        Raises:
            Full: it takes no more.
        """
        with self.changed:
            if len(self.jobs) >= self.size:
                self.outside = min(self.outside + 1, self.size)
                raise Full(len(self.jobs), self.pace * self.outside)  # each after those before

    def find(self, id: str, owner: str) -> Job | None:
        """The job, if it is the owner's; another's is not there."""
        with self.changed:
            job = self.jobs.get(id) or self.past.get(id)
        return job if job is not None and secrets.compare_digest(job.owner.encode(), owner.encode()) else None

    def cancel(self, job: Job) -> None:
        """One that waits is over at once, one that runs after its next call of the network."""
        job.cancelling.set()
        with self.changed:
            if job.state == QUEUED:
                self._over(job, CANCELLED)

    def position(self, job: Job) -> int:
        """How many are before it; 0 for the one that runs, or that is over."""
        with self.changed:
            return list(self.jobs).index(job.id) if job.id in self.jobs else 0

    def __len__(self) -> int:
        return len(self.jobs)

    def close(self) -> None:
        """Ends what waits, and the thread after the call of the network that it is in."""
        with self.changed:
            self.closed = True
        for job in list(self.jobs.values()):
            self.cancel(job)
        with self.changed:
            self.changed.notify_all()
        self.thread.join(GRACE)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.result, state = job.work(job), DONE
            except Cancelled:
                state = CANCELLED
            except Exception as error:
                job.error, state = self.explain(error), FAILED
            with self.changed:
                self._over(job, state)

    def _next(self) -> Job | None:
        with self.changed:
            while not self.jobs and not self.closed:
                self.changed.wait()
            if self.closed:
                return None
            job = next(iter(self.jobs.values()))
            job.state, job.began = RUNNING, time.monotonic()
            return job

    def _over(self, job: Job, state: str) -> None:
        """Moves a job to those that are over; of many, the oldest are forgotten."""
        job.state, job.ended = state, time.monotonic()
        job.work = _nothing  # which holds pictures
        self.jobs.pop(job.id, None)
        self.past[job.id] = job
        while len(self.past) > KEPT:
            self.past.popitem(last=False)
        self.counts[state] += 1
        if job.began is not None and state == DONE:
            self.pace += PACE * (job.ended - job.began - self.pace)
        job.over.set_result(None)


def _nothing(job: Job) -> None:
    """What a job does that is over."""
