"""Waiting for the archive of a model that is packed when it is first asked for."""

from __future__ import annotations

import asyncio
import time

from starlette.concurrency import run_in_threadpool

from preftune.app.jobs.exports import Form, request_archive
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError
from preftune.store.records import Job, ModelVersion


async def packed(platform: Platform, model: ModelVersion, form: Form, seconds: float) -> None:
    """Come back when the archive is there.

    Raises
        ApiError: 503 with Retry-After, it is not after so many seconds; 400, it cannot be packed.
    """
    until = time.monotonic() + seconds
    job = await run_in_threadpool(request_archive, platform, model, form)
    while job is not None and job.status not in {"succeeded", "failed"}:
        if time.monotonic() > until:
            raise ApiError(503, "the archive is being packed; ask again", code="packing", headers={"Retry-After": "2"})
        await asyncio.sleep(0.25)
        job = await run_in_threadpool(platform.store.get, Job, job.id)
    if job is not None and job.status == "failed":
        raise ApiError(
            400, f"the weights cannot be packed: {job.error.get('message', 'see the server log')}", code="export_failed"
        )
