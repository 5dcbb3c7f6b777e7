"""Jobs: created, listed, paused, resumed, cancelled, retried, deleted."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request

from preftune.app.jobs import states
from preftune.app.jobs.reporting import Report
from preftune.core import api
from preftune.server.lookup import native_job, platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.native.wanted import job_wanted
from preftune.server.recipes import submit
from preftune.server.security import CallerOf, audit
from preftune.store.records import Job, now

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])
WRONG_STATE: dict[int | str, dict[str, Any]] = {
    409: {
        "model": api.ErrorBody,
        "description": "The job is not in a state that allows it (code `wrong_state`); nothing was done.",
    }
}
SHOWN = ("train", "evaluate")  # validations and exports are steps of other requests
Idempotency = Annotated[
    str | None,
    Header(max_length=255, pattern=r"^[\x21-\x7e]+$", description="The same key with the same request gives the job of before."),
]


@router.post("", status_code=201)
def create_job(request: Request, caller: CallerOf, body: api.NewJob, idempotency_key: Idempotency = None) -> api.JobDetail:
    """Create a training job of any method. It waits for its files to be validated, and for a worker."""
    caller.must_be("developer")
    platform = platform_of(request)
    job = job_wanted(platform, caller.project, body, idempotency_key)
    wandb = body.wandb
    report = None
    if wandb is not None:
        report = Report(wandb.project, wandb.entity, wandb.name, tuple(wandb.tags), wandb.api_key, wandb.base_url)
    return shown.job_detail(submit(platform, caller, job, [], report))


@router.get("")
def list_jobs(
    request: Request, caller: CallerOf, asked: PartOf, status: Annotated[list[api.JobStatus] | None, Query(max_length=8)] = None,
    work: Literal["train", "evaluate"] | None = None, name: Annotated[str | None, Query(max_length=512)] = None,
    dialect: Annotated[str | None, Query(max_length=32)] = None,
) -> api.Page[api.Job]:  # fmt: skip
    """Jobs of the project, whichever dialect made them; ``metadata[k]=v`` narrows the list further."""
    metadata = {
        found.group(1): value for key, value in request.query_params.items() if (found := re.fullmatch(r"metadata\[(.+)\]", key))
    }
    where = {"work": work or SHOWN, "status": tuple(status) if status else None, "name": name, "dialect": dialect}
    return page_of(platform_of(request), Job, asked, caller.project, shown.job, where=where, metadata=metadata)


@router.get("/{job_id}")
def get_job(request: Request, caller: CallerOf, job_id: str) -> api.JobDetail:
    """One job with its resolved recipe."""
    return shown.job_detail(native_job(request, caller, job_id))


@router.post("/{job_id}/retry", responses=WRONG_STATE)
def retry_job(request: Request, caller: CallerOf, job_id: str, body: api.Retry) -> api.JobDetail:
    """Queue a failed or cancelled job again; it goes on from its last checkpoint."""
    caller.must_be("developer")
    platform = platform_of(request)
    job = states.retry(platform, native_job(request, caller, job_id), " ".join(body.reason.split()), no_probe=body.no_probe)
    audit(platform, caller, "job.retry", job_id, reason=body.reason)
    return shown.job_detail(job)


@router.post("/{job_id}/priority", responses=WRONG_STATE)
def set_priority(request: Request, caller: CallerOf, job_id: str, body: api.Priority) -> api.JobDetail:
    """Let a waiting job go before others, or behind them."""
    caller.must_be("developer")
    platform = platform_of(request)
    job = native_job(request, caller, job_id)
    waiting = {"status": ("validating", "queued", "paused")}
    changed = platform.store.change(Job, job.id, {"priority": body.priority, "updated_at": now()}, expect=waiting)
    if changed is None:
        raise states.WrongState(f"job {job.id} no longer waits; only a waiting job has a place in the queue")
    audit(platform, caller, "job.priority", job_id, priority=body.priority)
    return shown.job_detail(changed)


@router.post("/{job_id}/{action}", responses=WRONG_STATE)
def act(request: Request, caller: CallerOf, job_id: str, action: Literal["cancel", "pause", "resume"]) -> api.JobDetail:
    """Cancel, pause or resume a job; a running one checkpoints first."""
    caller.must_be("developer")
    do = {"cancel": states.cancel, "pause": states.pause, "resume": states.resume}[action]
    job = do(platform_of(request), native_job(request, caller, job_id))
    audit(platform_of(request), caller, f"job.{action}", job_id)
    return shown.job_detail(job)


@router.delete("/{job_id}", responses=WRONG_STATE)
def delete_job(request: Request, caller: CallerOf, job_id: str) -> api.Deleted:
    """Take an ended job out of every list; its models stay."""
    caller.must_be("developer")
    states.delete(platform_of(request), native_job(request, caller, job_id))
    audit(platform_of(request), caller, "job.delete", job_id)
    return api.Deleted(id=job_id)
