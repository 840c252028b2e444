"""The HTTP interface: pictures and control images on the queue that the page uses; health and metrics.

GET    /api/v1/health                 whether it is alive, and what is loaded
GET    /api/v1/metrics                for Prometheus
GET    /api/v1/models                 what may be picked
POST   /api/v1/pictures               asks for a picture: 202 and the job; 429 where the queue is full
GET    /api/v1/jobs/ID                how far a job is; ?wait=SECONDS answers when it is over, or then
GET    /api/v1/jobs/ID/picture        the PNG, with its recipe
GET    /api/v1/jobs/ID/controls/N     a control image, as its network saw it
DELETE /api/v1/jobs/ID                cancels
POST   /api/v1/detect                 the control image of a photo, a PNG
GET    /api/v1/openapi.json           all of this for programs
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from PIL import Image
from pydantic import BaseModel

from diffusion_kit.adapters.detectors import detectors
from diffusion_kit.adapters.pictures import eight_bit
from diffusion_kit.ledger import pictures

from .core import FORESEEN, Core, dumped, explain
from .queue import DONE, OVER, Full, Job
from .requests import DetectRequest, PictureRequest, asked
from .workshop import Result, make_control_image

PREFIX = "/api/v1"
OPEN = (f"{PREFIX}/health",)
LONGEST_WAIT = 60.0  # seconds
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}


class JobState(BaseModel):
    """How far a job is.

    Attributes:
        position: how many are before it.
        done, of: calls of the network.
        result: of one that is done.
    """

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int
    done: int
    of: int
    seconds_left: float | None
    error: str | None
    result: dict[str, Any] | None


async def core_of(request: Request) -> Core:
    core: Core = request.app.state.core
    return core


async def owner_of(request: Request) -> str:
    """The user; where there are none, whoever knows a job's id is its owner."""
    return str(request.state.user)


Own = Annotated[Core, Depends(core_of)]
Owner = Annotated[str, Depends(owner_of)]
router = APIRouter(prefix=PREFIX)


async def job_of(id: str, core: Own, owner: Owner) -> Job:
    job = core.queue.find(id, owner)
    if job is None:
        raise HTTPException(404, "no such job; of those that are over, the last are kept")
    return job


OfJob = Annotated[Job, Depends(job_of)]


async def result_of(job: OfJob) -> Result:
    if job.state != DONE or not isinstance(job.result, Result):
        raise HTTPException(409, f"the job is {job.state}")
    return job.result


OfResult = Annotated[Result, Depends(result_of)]


@router.post("/pictures", status_code=202)
def ask(body: PictureRequest, core: Own, owner: Owner) -> JobState:
    try:
        core.queue.check_room()  # before its pictures are decoded
        own = asked(body, core.config, core.library, core.inputs)
        return state_of(core, core.submit(own, owner, source=pictures.API))
    except FORESEEN as error:
        raise HTTPException(422, explain(error)) from None
    except Full as error:
        raise busy(error) from None


@router.get("/jobs/{id}")
async def job(job: OfJob, core: Own, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0.0) -> JobState:
    await over(job, wait)
    return state_of(core, job)


@router.delete("/jobs/{id}")
async def cancel(job: OfJob, core: Own) -> JobState:
    core.queue.cancel(job)
    return state_of(core, job)


@router.get("/jobs/{id}/picture", response_class=Response, responses=PNG)
def picture(result: OfResult) -> Response:
    return served(result.file)


@router.get("/jobs/{id}/controls/{number}", response_class=Response, responses=PNG)
def control(result: OfResult, number: int) -> Response:
    if not 1 <= number <= len(result.shown):
        raise HTTPException(404, f"the picture has {len(result.shown)} controls")
    return served(result.shown[number - 1])


@router.post("/detect", response_class=Response, responses=PNG)
async def detect(body: DetectRequest, core: Own, owner: Owner) -> Response:
    """On the queue too: detectors are networks."""
    try:
        data = core.inputs.decoded(body.image, "image")
        own = core.queue.submit(owner, lambda job: as_png(make_control_image(body, data)))
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    except Full as error:
        raise busy(error) from None
    await over(own, LONGEST_WAIT)
    if own.state not in OVER:
        core.queue.cancel(own)
        raise HTTPException(504, f"not done in {LONGEST_WAIT:.0f} s, and cancelled: try again later")
    if own.state != DONE:
        raise HTTPException(422, own.error or f"the job is {own.state}")
    picture, own.result = own.result, None  # the queue remembers jobs for a while: not pictures, too
    return Response(picture, media_type="image/png")


@router.get("/models")
def models(core: Own) -> dict[str, Any]:
    own = {"models": list(core.library.find_models()), "controls": list(core.library.find_controls())}
    return own | {"detectors": detectors()}


@router.get("/health")
async def health(core: Own) -> dict[str, Any]:
    alive = core.queue.thread.is_alive()
    state = {"alive": alive, "model": core.workshop.model, "waiting": len(core.queue), "queue": core.queue.size}
    if not alive:
        raise HTTPException(503, state)
    return state


@router.get("/metrics")
async def metrics(core: Own) -> Response:
    return Response("\n".join(lines_of(core)) + "\n", media_type="text/plain; version=0.0.4")


def state_of(core: Core, job: Job) -> JobState:
    result = dumped(job.result) if isinstance(job.result, Result) else None
    own = {name: getattr(job, name) for name in ("id", "state", "done", "of", "seconds_left", "error")}
    return JobState(position=core.queue.position(job), result=result, **own)


def busy(error: Full) -> HTTPException:
    return HTTPException(429, str(error), {"Retry-After": str(max(1, round(error.seconds)))})


def as_png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    eight_bit(picture).save(data, "PNG")
    return data.getvalue()


async def over(job: Job, seconds: float) -> None:
    """Waits until the job is over, or so long; nothing runs meanwhile, which would be taken from the pictures."""
    await asyncio.wait({asyncio.wrap_future(job.over)}, timeout=seconds)


def served(file: Path) -> Response:
    """The file in one piece: in many, each would wait for its turn beside the pictures that are made."""
    try:
        data = file.read_bytes()
    except OSError:
        raise HTTPException(410, "the file is not there any more") from None
    return Response(data, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})


def lines_of(core: Core) -> Iterator[str]:
    """Metrics in Prometheus' text format."""
    queue = core.queue
    yield "# TYPE diffusion_kit_jobs_total counter"
    for state, count in queue.counts.items():
        yield f'diffusion_kit_jobs_total{{state="{state}"}} {count}'
    gauges = {
        "queue_length": len(queue),
        "queue_size": queue.size,
        "seconds_per_job": f"{queue.pace:.3f}",
        "memory_bytes": psutil.Process().memory_info().rss,
    }
    for name, value in gauges.items():
        yield f"# TYPE diffusion_kit_{name} gauge"
        yield f"diffusion_kit_{name} {value}"
