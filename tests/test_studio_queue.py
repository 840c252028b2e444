"""The queue: bounded, one job at a time, and everybody's job is their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from conftest import needs
from PIL import Image

from diffusion_kit.studio.queue import CANCELLED, DONE, FAILED, KEPT, QUEUED, RUNNING, Full, Job, Queue

PATIENCE = 20.0


@pytest.fixture
def queue() -> Iterator[Queue]:
    own = Queue(3, str)
    yield own
    own.close()


class Held:
    """Work that goes on, step by step, when it is let."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        self.began.set()
        for k in range(3):
            assert self.go.wait(PATIENCE)
            job.step(k + 1, 3, Image.new("RGB", (k + 1, 1)))
        return "made"


def test_jobs_are_done_in_their_order(queue: Queue) -> None:
    held, order = Held(), list[int]()
    first = queue.submit("a", held)
    others = [queue.submit("a", lambda job, k=k: order.append(k)) for k in range(2)]
    assert held.began.wait(PATIENCE)
    assert [queue.position(job) for job in (first, *others)] == [0, 1, 2]
    assert (first.state, others[0].state) == (RUNNING, QUEUED)
    held.go.set()
    assert all(job.wait(PATIENCE) for job in (first, *others))
    assert order == [0, 1]
    assert (first.state, first.result, first.done, first.of) == (DONE, "made", 3, 3)


def test_a_full_queue_says_its_length_and_when_to_come_again(queue: Queue) -> None:
    held = Held()
    jobs = [queue.submit("a", held) for _ in range(3)]
    with pytest.raises(Full, match=r"full \(3 jobs\): try again in 1 s"):
        queue.submit("a", held)
    held.go.set()
    assert all(job.wait(PATIENCE) for job in jobs)
    assert queue.submit("a", held).wait(PATIENCE)


def test_one_who_waits_and_is_cancelled_cancels_nothing(queue: Queue) -> None:
    """A page's event can be cancelled from outside; the job is over all the same, and the next one runs."""
    needs("gradio")
    from diffusion_kit.studio.page.actions import awaited

    held = Held()
    job = queue.submit("a", held)

    async def given_up() -> None:
        waiting = asyncio.create_task(awaited(lambda: job))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting

    asyncio.run(given_up())
    assert not job.over.cancel()
    held.go.set()
    job.over.result(PATIENCE)
    assert queue.submit("a", lambda job: "next").over.result(PATIENCE) is None


def test_who_is_turned_away_comes_again_after_those_before(queue: Queue) -> None:
    """Else all come at once, again and again, and take the processor from the pictures."""
    held = Held()
    jobs = [queue.submit("a", held) for _ in range(3)]
    told = []
    for _ in range(5):
        with pytest.raises(Full) as found:
            queue.submit("a", held)
        told.append(found.value.seconds)
    assert told == [1.0, 2.0, 3.0, 3.0, 3.0], "at most as long as the whole queue"
    held.go.set()
    assert all(job.wait(PATIENCE) for job in jobs)


def test_one_that_waits_is_cancelled_at_once_and_one_that_runs_after_its_step(queue: Queue) -> None:
    held = Held()
    running, waiting = queue.submit("a", held, watched=True), queue.submit("a", held)
    assert held.began.wait(PATIENCE)
    queue.cancel(waiting)
    assert waiting.state == CANCELLED
    queue.cancel(running)
    assert not running.over.done()
    held.go.set()
    assert running.wait(PATIENCE)
    assert (running.state, running.done) == (CANCELLED, 1)
    assert running.preview is not None, "the last preview stays"
    assert queue.submit("a", lambda job: 5).wait(PATIENCE), "the next one runs"


def test_another_owners_job_is_not_there(queue: Queue) -> None:
    job = queue.submit("a", lambda job: 1)
    assert queue.find(job.id, "a") is job
    assert queue.find(job.id, "b") is None
    assert queue.find("other", "a") is None
    assert job.wait(PATIENCE)
    assert queue.find(job.id, "b") is None
    assert queue.find(job.id, "a") is job


def test_a_job_that_fails_says_so_and_the_next_one_runs(queue: Queue) -> None:
    def wrong(job: Job) -> None:
        raise ValueError("no such thing")

    job = queue.submit("a", wrong)
    assert job.wait(PATIENCE)
    assert (job.state, job.error) == (FAILED, "no such thing")
    assert queue.submit("a", lambda job: 1).wait(PATIENCE)


def test_what_waits_when_the_queue_is_closed_is_over() -> None:
    """Else who waits for it would wait for ever, and hold the process."""
    queue, work = Queue(3, str), Held()
    running, waiting = queue.submit("a", work), queue.submit("a", work)
    assert work.began.wait(PATIENCE)
    threading.Timer(0.1, work.go.set).start()
    queue.close()
    assert running.wait(PATIENCE)
    assert waiting.wait(PATIENCE)
    assert (running.state, waiting.state) == (CANCELLED, CANCELLED)


def test_what_is_over_is_forgotten_after_a_while(queue: Queue) -> None:
    first = queue.submit("a", lambda job: bytes(10))
    for _ in range(KEPT):
        assert queue.submit("a", lambda job: 1).wait(PATIENCE)
    assert first.over.done()
    assert queue.find(first.id, "a") is None
    assert queue.counts[DONE] == KEPT + 1
