"""OpenAI's dialect: files, fine-tuning jobs, models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response, StreamingResponse

from preftune.app.jobs import files, states
from preftune.app.jobs.models import find_model, list_models
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError, not_found
from preftune.server.recipes import Wanted, base_lr, job_of
from preftune.server.security import CallerOf, audit
from preftune.server.uploads import form_of, keep, text_of
from preftune.server.views import cursor_page, file_object, seconds
from preftune.store.base import Query as Asked
from preftune.store.records import Event, File, Job, ModelVersion, now

router = APIRouter(prefix="/v1")
STATUS = {
    "validating": "validating_files", "queued": "queued", "running": "running", "exporting": "running", "paused": "queued",
    "cancelled": "cancelled", "succeeded": "succeeded", "failed": "failed",
}  # fmt: skip
Auto = Literal["auto"]


class Body(BaseModel):
    """A request; unknown keys are kept, because clients send more than they document."""

    model_config = ConfigDict(extra="allow")


class Hyperparameters(Body):
    """Of a method; ``auto`` leaves the choice to the server."""

    beta: Auto | Annotated[float, Field(gt=0, le=10)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=65_536)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=10_000)] | None = None
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = None


class MethodOptions(Body):
    """What a method holds."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """``dpo`` or ``supervised`` with its hyper-parameters."""

    type: str = "supervised"
    dpo: MethodOptions | None = None
    supervised: MethodOptions | None = None


class JobRequest(Body):
    """The body of a new fine-tuning job. preftune: keys of a recipe's stage that OpenAI's API has no word for."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    preftune: dict[str, Any] = Field(default_factory=dict)


def _platform(request: Request) -> Platform:
    platform: Platform = request.app.state.platform
    return platform


@router.get("/files")
def list_files(
    request: Request, caller: CallerOf, after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc", purpose: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Files of the project."""
    where = {} if purpose is None else {"purpose": purpose}
    page = _platform(request).store.page(File, Asked(caller.project, where, after, limit, order == "desc"))
    return cursor_page(page, file_object)


@router.post("/files")
async def create_file(request: Request, caller: CallerOf) -> Response:
    """Upload a file with its bytes. (Without a file part it is Together's form of an upload.)"""
    caller.must_be("developer")
    form = await form_of(request)
    part = form.get("file")
    if not isinstance(part, UploadFile):
        raise ApiError(400, "file is missing; send it as a part of the form", param="file", code="missing_required_parameter")
    kept = await keep(_platform(request), caller, part, text_of(form, "purpose"))
    return JSONResponse(file_object(kept))


def _file(request: Request, caller: CallerOf, file_id: str) -> File:
    file = _platform(request).store.get(File, file_id, caller.project)
    if file is None:
        raise not_found("file", file_id)
    return file


@router.get("/files/{file_id}")
def get_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """One file."""
    return file_object(_file(request, caller, file_id))


@router.get("/files/{file_id}/content")
def file_content(request: Request, caller: CallerOf, file_id: str) -> Response:
    """The bytes of a file."""
    file = _file(request, caller, file_id)
    artifacts = _platform(request).artifacts
    headers = {"Content-Length": str(artifacts.size(file.artifact))}
    return StreamingResponse(artifacts.read(file.artifact), media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}")
def delete_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """Delete a file."""
    caller.must_be("developer")
    file = _file(request, caller, file_id)
    files.delete(_platform(request), file)
    audit(_platform(request), caller, "file.delete", file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.post("/fine_tuning/jobs")
def create_job(request: Request, caller: CallerOf, body: JobRequest) -> dict[str, Any]:
    """Create a fine-tuning job."""
    caller.must_be("developer")
    platform = _platform(request)
    method = body.method or Method(type="supervised")
    if method.type not in {"dpo", "supervised"}:
        raise ApiError(400, f"method.type {method.type!r} is not offered; there is dpo and supervised", param="method.type")
    name = "dpo" if method.type == "dpo" else "sft"
    own = method.dpo if name == "dpo" else method.supervised
    hyper = body.hyperparameters if own is None else own.hyperparameters
    wanted = Wanted(
        "openai", body.model, (body.training_file,), body.model_dump(exclude_none=True), _stage(name, hyper or Hyperparameters()),
        body.preftune, body.validation_file, body.suffix or "", body.seed or 0, None, body.metadata or {},
        request.headers.get("idempotency-key"),
    )  # fmt: skip
    job = states.submit(platform, job_of(platform, caller.project, wanted))
    audit(platform, caller, "job.create", job.id)
    return job_object(job)


def _stage(method: str, hyper: Hyperparameters) -> dict[str, Any]:
    stage: dict[str, Any] = {"method": method, "adapter": "lora"}
    if method == "dpo" and isinstance(hyper.beta, float):
        stage["loss"] = {"beta": hyper.beta}
    if isinstance(hyper.batch_size, int):
        stage["pairs_per_step"] = hyper.batch_size
    if isinstance(hyper.n_epochs, int):
        stage["epochs"] = hyper.n_epochs
    if isinstance(hyper.learning_rate_multiplier, float):
        stage["lr"] = base_lr(method, "lora") * hyper.learning_rate_multiplier
    return stage


@router.get("/fine_tuning/jobs")
def list_jobs(
    request: Request, caller: CallerOf, after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 20
) -> dict[str, Any]:
    """Fine-tuning jobs, newest first; ``metadata[k]=v`` narrows them."""
    wanted = {
        found.group(1): value for key, value in request.query_params.items() if (found := re.fullmatch(r"metadata\[(.+)\]", key))
    }
    query = Asked(caller.project, {"work": "train"}, after, limit, metadata=wanted)
    return cursor_page(_platform(request).store.page(Job, query), job_object)


def _job(request: Request, caller: CallerOf, job_id: str) -> Job:
    job = _platform(request).store.get(Job, job_id, caller.project)
    if job is None or job.work != "train":
        raise not_found("fine-tuning job", job_id)
    return job


@router.get("/fine_tuning/jobs/{job_id}")
def get_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """One job."""
    return job_object(_job(request, caller, job_id))


@router.post("/fine_tuning/jobs/{job_id}/{action}")
def act(request: Request, caller: CallerOf, job_id: str, action: Literal["cancel", "pause", "resume"]) -> dict[str, Any]:
    """Cancel, pause or resume a job."""
    caller.must_be("developer")
    do = {"cancel": states.cancel, "pause": states.pause, "resume": states.resume}[action]
    job = do(_platform(request), _job(request, caller, job_id))
    audit(_platform(request), caller, f"job.{action}", job_id)
    return job_object(job)


@router.get("/fine_tuning/jobs/{job_id}/events")
def job_events(
    request: Request, caller: CallerOf, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 20
) -> dict[str, Any]:
    """What happened to a job, newest first."""
    _job(request, caller, job_id)
    page = _platform(request).store.page(Event, Asked(caller.project, {"subject": job_id}, after, limit))
    return cursor_page(page, _event_object)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
def job_checkpoints(
    request: Request, caller: CallerOf, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] = 10
) -> dict[str, Any]:
    """Checkpoints of a finished job, newest first; each one's name can be used as a model."""
    _job(request, caller, job_id)
    page = _platform(request).store.page(ModelVersion, Asked(caller.project, {"job": job_id}, after, limit))
    return cursor_page(page, _checkpoint_object)


@router.get("/models")
def models(request: Request, caller: CallerOf) -> dict[str, Any]:
    """Models that this project may use."""
    return {"object": "list", "data": [_model_object(one) for one in list_models(_platform(request), caller.project)]}


@router.get("/models/{name:path}")
def get_model(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """One model."""
    return _model_object(_model(request, caller, name))


@router.delete("/models/{name:path}")
def delete_model(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """Delete a tuned model; base models are the operator's."""
    caller.must_be("developer")
    model = _model(request, caller, name)
    if model.form == "base":
        raise ApiError(403, f"{name!r} is a base model; only its operator can take it away", code="base_model")
    _platform(request).store.change(ModelVersion, model.id, {"deleted_at": now()})
    audit(_platform(request), caller, "model.delete", model.id, name=name)
    return {"id": name, "object": "model", "deleted": True}


def _model(request: Request, caller: CallerOf, name: str) -> ModelVersion:
    from preftune.core.errors import UsageError

    try:
        return find_model(_platform(request), caller.project, name)
    except UsageError:
        raise not_found("model", name) from None


def _model_object(model: ModelVersion) -> dict[str, Any]:
    owner = "preftune" if model.form == "base" else model.project
    return {"id": model.name, "object": "model", "created": seconds(model.created_at), "owned_by": owner}


def job_object(job: Job) -> dict[str, Any]:
    """A job in OpenAI's words."""
    stage = job.recipe["stages"][0]
    kind = "supervised" if stage["method"] == "sft" else "dpo"
    shown: dict[str, Any] = {
        "n_epochs": max(1, round(stage["epochs"])),
        "batch_size": stage["pairs_per_step"],
        "learning_rate_multiplier": 1.0 if stage["lr"] is None else stage["lr"] / base_lr(stage["method"], stage["adapter"]),
    }  # fmt: skip
    hyper = shown | ({"beta": stage["loss"].get("beta", 0.1)} if kind == "dpo" else {})
    error = {"code": job.error.get("code", "error"), "message": job.error.get("message", ""), "param": job.error.get("param")}
    select = stage["data"]["select"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": seconds(job.created_at),
        "finished_at": seconds(job.finished_at),
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "organization_id": job.project,
        "result_files": [],
        "status": STATUS[job.status],
        "training_file": stage["data"]["train"][0],
        "validation_file": select if isinstance(select, str) else None,
        "hyperparameters": shown,
        "seed": job.recipe["seed"],
        "trained_tokens": int(job.progress.get("metrics", {}).get("num_tokens", 0)) or None,
        "error": error if job.error else None,
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.metadata,
        "method": {"type": kind, kind: {"hyperparameters": hyper}},
    }


def _event_object(event: Event) -> dict[str, Any]:
    is_metrics = event.type == "metrics"
    data: dict[str, Any] = dict(event.data)
    if is_metrics:
        numbers = event.data["metrics"]
        data = {"step": event.step, **numbers, "train_loss": numbers.get("loss"), "valid_loss": numbers.get("eval_loss")}
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": seconds(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if is_metrics else "message",
        "data": data,
    }


def _checkpoint_object(model: ModelVersion) -> dict[str, Any]:
    numbers = model.facts.get("metrics", {})
    shown = {
        "step": model.step,
        "train_loss": numbers.get("loss"),
        "full_valid_loss": numbers.get("eval_loss"),
        "full_valid_mean_token_accuracy": None,
    }
    return {
        "id": model.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(model.created_at),
        "fine_tuned_model_checkpoint": model.name,
        "fine_tuning_job_id": model.job,
        "step_number": model.step or 0,
        "metrics": {key: float(value) for key, value in shown.items() if value is not None},
    }
