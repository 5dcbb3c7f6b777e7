"""What a job says: events and metrics as lists and as streams, and what its process printed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from preftune.app.jobs.logs import MAX_LOG, read_log
from preftune.app.jobs.platform import Platform
from preftune.core import api
from preftune.server.errors import ApiError
from preftune.server.lookup import native_job, platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.security import CallerOf
from preftune.store.base import Query as Asked
from preftune.store.records import ENDED, Event, Job

router = APIRouter(prefix="/api/v1/jobs/{job_id}", tags=["jobs"])
LOOK_SECONDS = 0.5
QUIET_SECONDS = 15.0  # then a comment says that the stream lives
AT_ONCE = 200
Type = Annotated[str | None, Query(max_length=64, description="Only events of this type, such as checkpoint.")]
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@router.get("/events")
def job_events(
    request: Request, caller: CallerOf, job_id: str, asked: PartOf, type: Type = None, level: api.Level | None = None  # noqa: A002 -- the query parameter's name
) -> api.Page[api.Event]:  # fmt: skip
    """What happened to a job."""
    job = native_job(request, caller, job_id, with_deleted=True)
    where = {"subject": job.id, "type": type, "level": level}
    return page_of(platform_of(request), Event, asked, caller.project, shown.event, where=where)


@router.get("/metrics")
def job_metrics(request: Request, caller: CallerOf, job_id: str, asked: PartOf) -> api.Page[api.Metrics]:
    """Numbers of steps, of held-out evaluations and of the probe."""
    job = native_job(request, caller, job_id, with_deleted=True)
    where = {"subject": job.id, "type": "metrics"}
    return page_of(platform_of(request), Event, asked, caller.project, shown.metrics, where=where)


@router.get("/stream", response_class=StreamingResponse, responses=_STREAM)
async def job_stream(
    request: Request, caller: CallerOf, job_id: str, type: Type = None,  # noqa: A002 -- the query parameter's name
    after: Annotated[str | None, Query(max_length=128)] = None,
    last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> StreamingResponse:  # fmt: skip
    """Events as server-sent events, oldest first, until the job has ended; then ``[DONE]``.

    ``after``, or the header Last-Event-ID that browsers send, goes on behind an event. With ``type=metrics`` the numbers.
    """
    platform = platform_of(request)
    job = await run_in_threadpool(native_job, request, caller, job_id)
    behind = after or last_event_id
    if behind is not None and await run_in_threadpool(platform.store.get, Event, behind, caller.project) is None:
        raise ApiError(400, "after: there is no such event; leave it out to begin with the first", param="after")
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_follow(platform, job, type, behind), media_type="text/event-stream", headers=headers)


async def _follow(platform: Platform, job: Job, type_: str | None, after: str | None) -> AsyncGenerator[bytes, None]:
    where = {"subject": job.id} | ({"type": type_} if type_ else {})
    clock = asyncio.get_running_loop()
    told_at = clock.time()
    while True:
        # the state is read before the events: what is said at the end is then among them
        current = await run_in_threadpool(platform.store.get, Job, job.id, with_deleted=True)
        asked = Asked(job.project, where, after, AT_ONCE, is_newest_first=False)
        page = await run_in_threadpool(platform.store.page, Event, asked)
        for one in page.items:
            yield f"id: {one.id}\ndata: {shown.event(one).model_dump_json()}\n\n".encode()
            after, told_at = one.id, clock.time()
        if page.has_more:
            continue
        if current is None or current.status in ENDED:
            break
        if clock.time() - told_at > QUIET_SECONDS:
            yield b": waiting\n\n"
            told_at = clock.time()
        await asyncio.sleep(LOOK_SECONDS)
    ended = {"status": "deleted" if current is None else current.status}
    yield f"event: end\ndata: {json.dumps(ended)}\n\ndata: [DONE]\n\n".encode()


@router.get("/logs")
def job_logs(
    request: Request, caller: CallerOf, job_id: str, after: Annotated[int, Query(ge=0, lt=2**53)] = 0,
    limit: Annotated[int, Query(ge=1024, le=MAX_LOG)] = MAX_LOG,
) -> api.JobLog:  # fmt: skip
    """What the job's process printed, from a byte on; empty where nothing was, or where it ran on another machine's disk."""
    caller.must_be("developer")
    job = native_job(request, caller, job_id, with_deleted=True)
    text, next_byte, has_more = read_log(platform_of(request), job.id, after, limit)
    return api.JobLog(text=text, next=next_byte, has_more=has_more)
