"""Evaluations: two models, or files of what they wrote, compared by rules or by a registered reward model."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from preftune.app.jobs import states
from preftune.app.jobs.contests import KIND, check_judge
from preftune.app.jobs.evaluations import rows_of
from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.core import api
from preftune.core.api_evaluations import NewEvaluation, Rows
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import native_job, platform_of
from preftune.server.native import shown
from preftune.server.native.jobs import Idempotency
from preftune.server.security import CallerOf, audit
from preftune.store.records import File, Job, new_id

router = APIRouter(prefix="/api/v1/evaluations", tags=["evaluations"])
MAX_ROWS = 10_000


@router.post("", status_code=201)
def create_evaluation(
    request: Request, caller: CallerOf, body: NewEvaluation, idempotency_key: Idempotency = None
) -> api.JobDetail:
    """Compare two sides over prompts, as `preftune compare` does. It is a job: its `result` has the verdict and the win rate."""
    caller.must_be("developer")
    platform = platform_of(request)
    job = states.submit(platform, _job(platform, caller.project, body, idempotency_key))
    audit(platform, caller, "evaluation.create", job.id)
    return shown.job_detail(job)


@router.get("/{job_id}/rows")
def list_rows(
    request: Request, caller: CallerOf, job_id: str, offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 100,
) -> Rows:  # fmt: skip
    """Judged prompts of a finished evaluation, with what both sides wrote and the score: 1 where the first is better."""
    job = native_job(request, caller, job_id)
    if job.work != "evaluate":
        raise not_found("evaluation", job_id)
    wanted = range(offset, offset + limit)
    rows: list[dict[str, Any]] = []
    has_more = False
    for index, row in enumerate(rows_of(platform_of(request), job)):
        if index in wanted:
            rows.append(shown.finite(row))
        elif index >= wanted.stop:
            has_more = True
            break
    return Rows(data=rows, has_more=has_more)


def _job(platform: Platform, project: str, body: NewEvaluation, idempotency: str | None) -> Job:
    sides = {"first": body.first, "second": body.second}
    for name, side in sides.items():
        if bool(side.model) == bool(side.file):
            raise ApiError(400, f"{name}: name a model or a file of completions, one of them", param=name)
        if side.model:
            find_model(platform, project, side.model)
    prompts = body.prompts or (body.first.file if body.first.file and body.second.file else None)
    if not prompts:
        raise ApiError(
            400, "prompts is missing; name a file of prompts (two files of completions bring their own)", param="prompts",
            code="missing_required_parameter",
        )  # fmt: skip
    files = tuple(dict.fromkeys(one for one in (prompts, body.first.file, body.second.file) if one))
    for file_id in files:
        if platform.store.get(File, file_id, project) is None:
            raise ApiError(400, f"there is no file {file_id[:80]!r}; upload it first", param="prompts", code="file_not_found")
    settings = {
        "limit": body.limit, "margin": body.margin, "decoding.temperature": body.temperature,
        "decoding.max_new_tokens": body.max_new_tokens,
    }  # fmt: skip
    task = {
        "kind": KIND, "judge": check_judge(platform, project, body.judge), "prompts": prompts,
        "settings": {key: value for key, value in settings.items() if value is not None},
        **{name: side.model_dump(exclude_none=True) for name, side in sides.items()},
    }  # fmt: skip
    return Job(
        id=new_id("eval-"), project=project, work="evaluate", dialect="native", request=body.model_dump(exclude_unset=True),
        recipe=task, files=files, name="evaluation:contest", metadata=body.metadata, idempotency=idempotency,
    )  # fmt: skip
