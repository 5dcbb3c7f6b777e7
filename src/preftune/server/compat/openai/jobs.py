"""OpenAI's fine-tuning jobs."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from preftune.app.jobs import states
from preftune.app.jobs.reporting import Report
from preftune.server.errors import ApiError
from preftune.server.job_views import beta_of, is_sft, lr_of, num_tokens, own_words, seconds_left, stage_of, total_steps
from preftune.server.lookup import platform_of, training_job
from preftune.server.recipes import NAME, Wanted, base_lr, check_beta, create
from preftune.server.security import CallerOf, audit
from preftune.server.views import cursor_page, seconds
from preftune.store.base import Query as Asked
from preftune.store.records import Event, Job, ModelVersion, now

router = APIRouter(prefix="/v1/fine_tuning")
STATUS = {
    "validating": "validating_files", "queued": "queued", "running": "running", "exporting": "running", "paused": "queued",
    "cancelled": "cancelled", "succeeded": "succeeded", "failed": "failed",
}  # fmt: skip
Auto = Literal["auto"]
Limit = Annotated[int, Query(ge=1, le=10_000)]


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


class Wandb(BaseModel):
    """Where a run is reported to; nothing else of it is kept, a key least of all."""

    model_config = ConfigDict(extra="ignore")
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[str] | None = None


class Integration(BaseModel):
    """Another service that a job works with."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["wandb"]
    wandb: Wandb


class JobRequest(Body):
    """The body of a new fine-tuning job. preftune: keys of a recipe's stage that OpenAI's API has no word for."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=NAME)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    preftune: dict[str, Any] = Field(default_factory=dict)


@router.post("/jobs")
def create_job(request: Request, caller: CallerOf, body: JobRequest) -> dict[str, Any]:
    """Create a fine-tuning job."""
    method = body.method or Method(type="supervised")
    if method.type not in {"dpo", "supervised"}:
        raise ApiError(400, f"method.type {method.type!r} is not offered; there is dpo and supervised", param="method.type")
    name = "dpo" if method.type == "dpo" else "sft"
    own = method.dpo if name == "dpo" else method.supervised
    hyper = (body.hyperparameters if own is None else own.hyperparameters) or Hyperparameters()
    wanted = Wanted(
        "openai", body.model, (body.training_file,), body.model_dump(exclude_none=True), _stage(name, hyper, body.preftune), {},
        body.preftune, body.validation_file, body.suffix or "", body.seed or 0, None, body.metadata or {},
        request.headers.get("idempotency-key"),
    )  # fmt: skip
    if isinstance(hyper.beta, float):
        wanted.warnings += check_beta(hyper.beta, name, "beta")
    wanted.report = _report(body.integrations)
    return job_object(create(platform_of(request), caller, wanted))


def _report(integrations: list[Integration] | None) -> Report | None:
    """Where the job reports to. A body has no key: OpenAI connects an organisation once, here the server's WANDB_API_KEY does."""
    if not integrations:
        return None
    if len(integrations) > 1:
        raise ApiError(400, "a job reports to one W&B project; send one integration", param="integrations")
    one = integrations[0].wandb
    return Report(one.project, one.entity or "", one.name or "", tuple(one.tags or ()))


def _stage(method: str, hyper: Hyperparameters, extra: dict[str, Any]) -> dict[str, Any]:
    stage: dict[str, Any] = {"method": method, "adapter": "lora"}
    if method == "dpo" and isinstance(hyper.beta, float):
        stage["loss"] = {"beta": hyper.beta}
    if isinstance(hyper.batch_size, int):
        stage["pairs_per_step"] = hyper.batch_size
    if isinstance(hyper.n_epochs, int):
        stage["epochs"] = hyper.n_epochs
    if isinstance(hyper.learning_rate_multiplier, float):
        adapter = "full" if extra.get("adapter") == "full" else "lora"
        stage["lr"] = base_lr(str(extra.get("method", method)), adapter) * hyper.learning_rate_multiplier
    return stage


@router.get("/jobs")
def list_jobs(request: Request, caller: CallerOf, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Fine-tuning jobs, newest first; ``metadata[k]=v`` narrows them."""
    wanted = {
        found.group(1): value for key, value in request.query_params.items() if (found := re.fullmatch(r"metadata\[(.+)\]", key))
    }
    query = Asked(caller.project, {"work": "train"}, after, limit, metadata=wanted)
    return cursor_page(platform_of(request).store.page(Job, query), job_object)


@router.get("/jobs/{job_id}")
def get_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """One job."""
    return job_object(training_job(request, caller, job_id))


@router.post("/jobs/{job_id}/{action}")
def act(request: Request, caller: CallerOf, job_id: str, action: Literal["cancel", "pause", "resume"]) -> dict[str, Any]:
    """Cancel, pause or resume a job."""
    caller.must_be("developer")
    do = {"cancel": states.cancel, "pause": states.pause, "resume": states.resume}[action]
    job = do(platform_of(request), training_job(request, caller, job_id))
    audit(platform_of(request), caller, f"job.{action}", job_id)
    return job_object(job)


@router.get("/jobs/{job_id}/events")
def job_events(request: Request, caller: CallerOf, job_id: str, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """What happened to a job, newest first."""
    job = training_job(request, caller, job_id)
    page = platform_of(request).store.page(Event, Asked(caller.project, {"subject": job_id}, after, limit))
    steps = total_steps(job)
    return cursor_page(page, lambda event: _event_object(event, steps))


@router.get("/jobs/{job_id}/checkpoints")
def job_checkpoints(
    request: Request, caller: CallerOf, job_id: str, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """Checkpoints of a finished job, newest first; each one's name can be used as a model."""
    training_job(request, caller, job_id)
    page = platform_of(request).store.page(ModelVersion, Asked(caller.project, {"job": job_id}, after, limit))
    return cursor_page(page, _checkpoint_object)


def job_object(job: Job) -> dict[str, Any]:
    """A job in OpenAI's words."""
    stage = stage_of(job)
    kind = "supervised" if is_sft(stage) else "dpo"
    shown: dict[str, Any] = {
        "n_epochs": max(1, round(stage["epochs"])),
        "batch_size": stage["pairs_per_step"],
        "learning_rate_multiplier": lr_of(stage) / base_lr(stage["method"], stage["adapter"]),
    }
    beta = beta_of(stage)
    hyper = shown | ({"beta": beta} if kind == "dpo" and beta is not None else {})
    error = {"code": job.error.get("code", "error"), "message": job.error.get("message", ""), "param": job.error.get("param")}
    select, left = stage["data"]["select"], seconds_left(job)
    is_open = job.status in {"running", "exporting"} and left is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": seconds(job.created_at),
        "finished_at": seconds(job.finished_at),
        "fine_tuned_model": job.name if job.status == "succeeded" else None,
        "organization_id": job.project,
        "result_files": list(job.result.get("files", ())),
        "status": STATUS[job.status],
        "training_file": stage["data"]["train"][0],
        "validation_file": select if isinstance(select, str) else None,
        "hyperparameters": shown,
        "seed": job.recipe["seed"],
        "trained_tokens": num_tokens(job) or None,
        "error": error if job.error else None,
        "estimated_finish": int(now().timestamp()) + (left or 0) if is_open else None,
        "integrations": [
            {"type": one["type"], "wandb": {"entity": None, "name": None, "tags": None, **one["wandb"]}}
            for one in job.request.get("integrations", ())
        ],
        "metadata": job.metadata,
        "method": {"type": kind, kind: {"hyperparameters": hyper}},
        **own_words(job),
    }


def _event_object(event: Event, steps: int | None) -> dict[str, Any]:
    is_metrics = event.type == "metrics"
    data: dict[str, Any] = dict(event.data)
    if is_metrics:
        numbers = event.data["metrics"]
        data = {
            "step": event.step,
            "total_steps": steps,
            **numbers,
            "train_loss": numbers.get("loss"),
            "valid_loss": numbers.get("eval_loss"),
        }
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
        "train_mean_token_accuracy": numbers.get("mean_token_accuracy"),
        "full_valid_mean_token_accuracy": numbers.get("eval_mean_token_accuracy"),
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
