"""Together's evaluations: two models compared, answers scored or classified, by a judge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from preftune.app.grading.templates import check_jinja
from preftune.app.jobs.evaluations import submit_evaluation
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import every, file_of, platform_of
from preftune.server.recipes import without_secrets
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import zulu
from preftune.store.base import Query as Asked
from preftune.store.records import Event, Job, new_id

router = APIRouter(prefix="/v1/evaluation")
STATUS = {
    "validating": "pending", "queued": "queued", "running": "running", "exporting": "running", "paused": "pending",
    "cancelled": "user_error", "succeeded": "completed", "failed": "error",
}  # fmt: skip
MINE = {"work": "evaluate", "dialect": "together"}
Template = Annotated[str, Field(max_length=20_000)]


class Asked_(BaseModel):  # noqa: N801 -- Asked is the store's query here
    """A model that is asked; an external one has an address, and perhaps a token that is kept encrypted."""

    model_config = ConfigDict(extra="allow")
    model: Annotated[str, Field(min_length=1, max_length=512)]
    model_source: Literal["serverless", "dedicated", "external"] = "serverless"
    system_template: Template = ""
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    external_base_url: str | None = None
    external_api_token: str | None = None


class Writer(Asked_):
    """A model whose answers are evaluated."""

    input_template: Template


class Parameters(BaseModel):
    """What is evaluated, and how."""

    model_config = ConfigDict(extra="allow")
    input_data_file_path: str
    judge: Asked_
    model_a: str | Writer | None = None
    model_b: str | Writer | None = None
    model_to_evaluate: str | Writer | None = None
    disable_position_bias_correction: bool = False
    min_score: float | None = None
    max_score: float | None = None
    pass_threshold: float | None = None
    labels: Annotated[list[str], Field(min_length=2, max_length=100)] | None = None
    pass_labels: list[str] | None = None


class NewEvaluation(BaseModel):
    """The body of a new evaluation."""

    type: Literal["compare", "score", "classify"]
    parameters: Parameters


@router.post("")
def create(request: Request, caller: CallerOf, body: NewEvaluation) -> dict[str, Any]:
    """Queue an evaluation of a file's rows."""
    caller.must_be("developer")
    platform, given = platform_of(request), body.parameters
    file = file_of(request, caller, given.input_data_file_path)
    tokens = {one.external_api_token for one in _asked(given) if one.external_api_token}
    if len(tokens) > 1:
        raise ApiError(400, "one external_api_token is taken for an evaluation", param="parameters.judge.external_api_token")
    job = Job(
        id=new_id("eval-"), project=caller.project, work="evaluate", status="validating", dialect="together",
        request={"type": body.type, "parameters": without_secrets(given.model_dump(exclude_none=True))},
        recipe=_task(body.type, given), files=(file.id,), name=f"evaluation:{body.type}",
        idempotency=request.headers.get("idempotency-key"),
    )  # fmt: skip
    job = submit_evaluation(platform, job, next(iter(tokens), None))
    audit(platform, caller, "evaluation.create", job.id)
    return {"workflow_id": job.id, "status": "pending"}


@router.get("")
def list_evaluations(
    request: Request, caller: CallerOf, limit: Annotated[int, Query(ge=1, le=10_000)] = 100, status: str | None = None
) -> list[dict[str, Any]]:
    """Evaluations, newest first; a bare list, as Together's client wants it."""
    found = (_object(request, job) for job in every(platform_of(request), Job, caller.project, MINE))
    return [one for one, _ in zip((one for one in found if status in {None, one["status"]}), range(limit), strict=False)]


@router.get("/{evaluation_id}")
def get_evaluation(request: Request, caller: CallerOf, evaluation_id: str) -> dict[str, Any]:
    """One evaluation."""
    return _object(request, _job(request, caller, evaluation_id))


@router.get("/{evaluation_id}/status")
def get_status(request: Request, caller: CallerOf, evaluation_id: str) -> dict[str, Any]:
    """Status and results of an evaluation."""
    job = _job(request, caller, evaluation_id)
    return {"status": STATUS[job.status], "results": _results(job)}


def _asked(given: Parameters) -> list[Asked_]:
    sides = (given.judge, given.model_a, given.model_b, given.model_to_evaluate)
    return [one for one in sides if isinstance(one, Asked_)]


def _task(kind: str, given: Parameters) -> dict[str, Any]:
    for one in _asked(given):
        check_jinja(one.system_template, "system_template")
        if isinstance(one, Writer):
            check_jinja(one.input_template, "input_template")
    task: dict[str, Any] = {"kind": kind, "judge": _model(given.judge)}
    if kind == "compare":
        return {
            **task, "model_a": _needed(given, "model_a"), "model_b": _needed(given, "model_b"),
            "both_orders": not given.disable_position_bias_correction,
        }  # fmt: skip
    task["model_to_evaluate"] = _needed(given, "model_to_evaluate")
    if kind == "score":
        low, high, threshold = (_needed(given, name) for name in ("min_score", "max_score", "pass_threshold"))
        if not low < high:
            raise ApiError(400, "min_score must be below max_score", param="parameters.min_score")
        return {**task, "min_score": low, "max_score": high, "pass_threshold": threshold}
    labels, passing = _needed(given, "labels"), _needed(given, "pass_labels")
    if not set(passing) <= set(labels):
        raise ApiError(400, "pass_labels must be some of the labels", param="parameters.pass_labels")
    return {**task, "labels": labels, "pass_labels": passing}


def _needed(given: Parameters, name: str) -> Any:
    value = getattr(given, name)
    if value is None:
        raise ApiError(400, f"parameters.{name} is missing", param=f"parameters.{name}", code="missing_required_parameter")
    return _model(value) if isinstance(value, Asked_) else value


def _model(one: Asked_) -> dict[str, Any]:
    spec: dict[str, Any] = {"model": one.model, "system_template": one.system_template}
    if isinstance(one, Writer):
        spec["input_template"] = one.input_template
    spec |= {key: value for key in ("max_tokens", "temperature") if (value := getattr(one, key)) is not None}
    if one.model_source == "external":
        url = one.external_base_url or ""
        if not url.startswith(("http://", "https://")):
            raise ApiError(400, "an external model needs external_base_url, http or https", param="external_base_url")
        spec["url"] = url
    return spec


def _job(request: Request, caller: Caller, evaluation_id: str) -> Job:
    job = platform_of(request).store.get(Job, evaluation_id, caller.project)
    if job is None or job.work != "evaluate" or job.dialect != "together":
        raise not_found("evaluation", evaluation_id)
    return job


def _results(job: Job) -> dict[str, Any] | None:
    if job.status == "failed":
        return {"error": str(job.error.get("message", ""))}
    return dict(job.result) if job.status == "succeeded" else None


def _object(request: Request, job: Job) -> dict[str, Any]:
    query = Asked(job.project, {"subject": job.id}, limit=1000, is_newest_first=False)
    updates = platform_of(request).store.page(Event, query).items
    return {
        "workflow_id": job.id,
        "type": job.request["type"],
        "owner_id": job.project,
        "status": STATUS[job.status],
        "parameters": job.request["parameters"],
        "created_at": zulu(job.created_at),
        "updated_at": zulu(job.updated_at),
        "results": _results(job),
        "status_updates": [{"status": one.type, "message": one.message, "timestamp": zulu(one.created_at)} for one in updates],
    }
