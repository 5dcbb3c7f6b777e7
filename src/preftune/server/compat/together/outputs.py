"""What Together's clients fetch of a job: metrics, checkpoints, weights."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from preftune.app.jobs.exports import Form, archive_key
from preftune.app.jobs.models import start_of
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.server.errors import ApiError
from preftune.server.job_views import checkpoints_of, is_held_out, metrics_of
from preftune.server.lookup import platform_of, training_job
from preftune.server.packing import packed
from preftune.server.ranges import content_of
from preftune.server.security import CallerOf, audit
from preftune.server.views import zulu
from preftune.store.records import Event, Job, ModelVersion

router = APIRouter(prefix="/v1")
# the SDK gives up after 60 s and asks again; the command line waits for as long as it takes, and never asks again
SDK_SECONDS, CLI_SECONDS = 50.0, 1800.0
STEP = "train/global_step"
What = Literal["merged", "adapter", "model_output_path", "default"]


@router.get("/fine-tunes/{job_id}/metrics")
def job_metrics(
    request: Request, caller: CallerOf, job_id: str,
    global_step_from: int | None = None, global_step_to: int | None = None,
    logged_at_from: datetime | None = None, logged_at_to: datetime | None = None,
    resolution: Annotated[int | None, Query(ge=1)] = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics by step: ``train/...`` of the steps, evenly thinned out to ``resolution``; ``eval/...`` of all evaluations."""
    platform, job = platform_of(request), training_job(request, caller, job_id)
    low, high = global_step_from or 0, math.inf if global_step_to is None else global_step_to
    found = [
        event for event in metrics_of(platform, job)
        if low <= (event.step or 0) <= high and _is_between(event.created_at, logged_at_from, logged_at_to)
    ]  # fmt: skip
    train = [event for event in found if not is_held_out(event)]
    if resolution is not None and len(train) > resolution:
        places = {round(k * (len(train) - 1) / max(1, resolution - 1)) for k in range(resolution)}
        train = [train[place] for place in sorted(places)]
    rows = [_row(event) for event in train + [event for event in found if is_held_out(event)]]
    return {"metrics": sorted(rows, key=lambda row: row[STEP])}


def _row(event: Event) -> dict[str, float]:
    """Finite numbers only; names are TRL's behind ``train/`` or ``eval/``."""
    is_eval = is_held_out(event)
    named: dict[str, float] = {STEP: float(event.step or 0)}
    for name, value in event.data["metrics"].items():
        if math.isfinite(value):
            named[f"eval/{name.removeprefix('eval_')}" if is_eval else f"train/{name}"] = float(value)
    named["timestamp"] = event.created_at.timestamp()
    return named


def _is_between(time: datetime, low: datetime | None, high: datetime | None) -> bool:
    def aware(given: datetime) -> datetime:
        return given if given.tzinfo else given.replace(tzinfo=time.tzinfo)

    return (low is None or time >= aware(low)) and (high is None or time <= aware(high))


@router.get("/fine-tunes/{job_id}/checkpoints")
def job_checkpoints(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """What can be downloaded or gone on from, newest first; the final model has its step too."""
    job = training_job(request, caller, job_id)
    made = checkpoints_of(platform_of(request), job)
    return {"data": [_checkpoint(job, model) for model in made]}


def _checkpoint(job: Job, model: ModelVersion) -> dict[str, Any]:
    kind = "Final" if model.name == job.name else "Intermediate"
    what = "adapter" if model.form == "adapter" else "model"
    return {
        "step": model.step or 0,
        "created_at": zulu(model.created_at),
        "path": model.name,
        "checkpoint_type": f"{kind} {'Adapter' if what == 'adapter' else 'Model'}",
        "checkpoint": what,
        "object_id": model.id,
        "object_name": model.name,
    }


@router.get("/finetune/download")
async def download(
    request: Request, caller: CallerOf, ft_id: str, checkpoint: What = "merged",
    checkpoint_step: int | None = None,
) -> Response:  # fmt: skip
    """The weights as one archive; packed when they are first asked for, while the client waits. Ranges are honoured."""
    caller.must_be("developer")
    platform = platform_of(request)
    form: Form = "adapter" if checkpoint == "adapter" else "merged"
    model = await run_in_threadpool(_model, platform, caller.project, ft_id, checkpoint_step)
    is_cli = request.headers.get("user-agent", "").startswith("AsyncTogether")
    await packed(platform, model, form, CLI_SECONDS if is_cli else SDK_SECONDS)
    audit(platform, caller, "model.download", model.id, form=form)
    return await run_in_threadpool(content_of, request, archive_key(model, form), "application/x-tar")


def _model(platform: Platform, project: str, ft_id: str, step: int | None) -> ModelVersion:
    job = platform.store.get(Job, ft_id.partition(":")[0], project)
    if job is not None and job.status != "succeeded":
        raise ApiError(404, f"job {job.id} is {job.status}; its weights are there when it has succeeded", code="not_finished")
    try:
        return start_of(platform, project, ft_id if step is None else f"{ft_id.partition(':')[0]}:{step}")
    except UsageError as error:
        raise ApiError(404, str(error), param="ft_id", code="checkpoint_not_found") from None
