"""SeekrFlow's fine-tuning jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from preftune.app.jobs import states
from preftune.server.compat.seekr.projects import LABEL, project_by_number
from preftune.server.errors import ApiError
from preftune.server.job_views import beta_of, is_held_out, is_sft, lr_of, metrics_of, own_words, stage_of
from preftune.server.lookup import every, platform_of, training_job
from preftune.server.recipes import Wanted, check_beta, create
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import whole_list, zulu
from preftune.store.records import Job

router = APIRouter(prefix="/v1/flow")
STATUS = {
    "validating": "pending", "queued": "queued", "running": "running", "exporting": "running", "paused": "pending",
    "cancelled": "cancelled", "succeeded": "completed", "failed": "failed",
}  # fmt: skip
METHODS = {"PREFERENCE": "dpo", "STANDARD": "sft"}
# extras of peft's LoraConfig that mean something here
EXTRAS = {"use_rslora": "rslora", "use_dora": "dora", "target_modules": "target_modules"}
Accelerator = Literal["GAUDI2", "GAUDI3", "A100", "A10", "H100", "MI300X"]


class Body(BaseModel):
    """A request; unknown keys are kept, because clients send more than they document."""

    model_config = ConfigDict(extra="allow")


class Lora(Body):
    """Options of the adapter."""

    r: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    bias: Literal["none", "all", "lora_only"] = "none"
    extras: dict[str, Any] = Field(default_factory=dict)


class Training(Body):
    """What is trained. preftune: keys of a recipe's stage that SeekrFlow's API has no word for."""

    training_files: Annotated[list[str], Field(min_length=1, max_length=100)]
    model: Annotated[str, Field(min_length=1, max_length=512)]
    n_epochs: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    n_checkpoints: Annotated[int, Field(ge=0, le=1000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    experiment_name: Annotated[str, Field(max_length=100)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    pre_train: bool = False
    fine_tune_type: Literal["STANDARD", "PREFERENCE", "REINFORCEMENT", "GRPO"] = "STANDARD"
    lora_config: Lora | None = None
    validation_files: list[str] | None = None
    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    gradient_checkpointing: bool | None = None
    preftune: dict[str, Any] = Field(default_factory=dict)


class Infrastructure(Body):
    """Where a hosted service would train; what is asked for is said again, the worker trains on what it has."""

    accel_type: Accelerator = "H100"
    n_accel: Annotated[int, Field(ge=1)] = 1
    n_node: Annotated[int, Field(ge=1)] = 1


class JobRequest(Body):
    """The body of a new fine-tuning job."""

    project_id: int
    training_config: Training
    infrastructure_config: Infrastructure = Infrastructure()


@router.post("/fine-tune")
@router.post("/fine-tunes")
def create_job(request: Request, caller: CallerOf, body: JobRequest) -> dict[str, Any]:
    """Create a fine-tuning job. (One client posts to the singular, the other to the plural.)"""
    project_by_number(request, caller, body.project_id)
    wanted = _wanted(body, request.headers.get("idempotency-key"))
    return job_object(create(platform_of(request), caller, wanted))


def _wanted(body: JobRequest, idempotency: str | None) -> Wanted:
    config = body.training_config
    if config.fine_tune_type not in METHODS:
        raise ApiError(
            400, f"fine_tune_type {config.fine_tune_type} is not offered; there is {', '.join(METHODS)}", param="fine_tune_type"
        )
    if config.pre_train:
        raise ApiError(400, "pre_train is not offered: rows of plain text have no answer to learn", param="pre_train")
    if len(config.validation_files or ()) > 1:
        raise ApiError(400, "one validation file is taken; join the others to it", param="validation_files")
    method = METHODS[config.fine_tune_type]
    if config.beta is not None and method != "dpo":
        raise ApiError(400, "beta belongs to fine_tune_type PREFERENCE", param="beta")
    checkpoints = max(0, (config.n_checkpoints or 1) - 1)
    stage: dict[str, Any] = {
        "method": method, "epochs": config.n_epochs, "lr": config.learning_rate, "checkpoints": checkpoints,
        "keep_checkpoints": max(1, checkpoints), "gradient_checkpointing": bool(config.gradient_checkpointing),
        **_adapter(config.lora_config),
    }  # fmt: skip
    if config.batch_size is not None:
        stage["pairs_per_step"] = config.batch_size
    warnings: list[str] = []
    if config.beta is not None:
        stage["loss"] = {"beta": config.beta}
        warnings = check_beta(config.beta, method, "beta")
    machine = body.infrastructure_config
    if machine.n_accel > 1 or machine.n_node > 1:
        asked = f"n_accel {machine.n_accel}, n_node {machine.n_node}"
        warnings.append(
            f"{asked} is not honoured: a job trains in one process, on one GPU or the CPU of the worker that takes it"
        )
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in config.experiment_name or "")
    return Wanted(
        "seekr", config.model, tuple(config.training_files), body.model_dump(exclude_none=True), stage,
        {} if config.max_length is None else {"max_length": config.max_length}, config.preftune,
        next(iter(config.validation_files or ()), None), name[:64], metadata={LABEL: str(body.project_id)},
        idempotency=idempotency, warnings=warnings,
    )  # fmt: skip


def _adapter(lora: Lora | None) -> dict[str, Any]:
    """Without a lora_config every weight is trained."""
    if lora is None:
        return {"adapter": "full"}
    if lora.bias != "none":
        raise ApiError(400, "biases are not trained with LoRA here; send bias none", param="lora_config.bias")
    unknown = sorted(set(lora.extras) - set(EXTRAS))
    if unknown:
        raise ApiError(
            400, f"lora_config.extras.{unknown[0]} is not offered; there is {', '.join(EXTRAS)}", param="lora_config.extras"
        )
    extras = {EXTRAS[key]: value for key, value in lora.extras.items()}
    return {"adapter": "lora", "lora": {"rank": lora.r, "alpha": float(lora.alpha), "dropout": lora.dropout, **extras}}


@router.get("/fine-tunes")
def list_jobs(request: Request, caller: CallerOf) -> Response:
    """Every fine-tuning job, newest first, also those that other clients created."""
    found = every(platform_of(request), Job, caller.project, {"work": "train"})
    return whole_list(job_object(job) for job in found)


@router.get("/fine-tunes/{job_id}")
def get_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """One job; of a deleted one it is said that it was."""
    job = training_job(request, caller, job_id, with_deleted=True)
    return job_object(job) | {"events": _events(request, job)}


@router.get("/fine-tunes/{job_id}/events")
def job_events(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """The metrics of a job, a point for each step, oldest first."""
    return {"object": "list", "data": _events(request, training_job(request, caller, job_id))}


@router.put("/fine-tunes/{job_id}/cancel")
@router.post("/fine-tunes/{job_id}/cancel")
def cancel_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """Cancel a job; a running one checkpoints first."""
    caller.must_be("developer")
    job = states.cancel(platform_of(request), training_job(request, caller, job_id))
    audit(platform_of(request), caller, "job.cancel", job_id)
    return job_object(job)


@router.get("/fine-tunes/{job_id}/promote-model")
def promote(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """Let a run's model answer. A GET that changes something: SeekrFlow's client sends it so, and only a key allows it."""
    return _set_demoted(request, caller, job_id, is_demoted=False)


@router.get("/fine-tunes/{job_id}/demote-model")
def demote(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """Say that a run's model is not to be used any more."""
    return _set_demoted(request, caller, job_id, is_demoted=True)


def _set_demoted(request: Request, caller: Caller, job_id: str, *, is_demoted: bool) -> dict[str, Any]:
    caller.must_be("developer")
    job = training_job(request, caller, job_id)
    if job.status != "succeeded":
        raise ApiError(400, f"job {job_id} is {STATUS[job.status]}; only a completed run has a model", code="wrong_state")
    result = {**job.result, "is_demoted": is_demoted}
    platform_of(request).store.change(Job, job.id, {"result": result}, expect={"status": "succeeded"})
    audit(platform_of(request), caller, "job.demote" if is_demoted else "job.promote", job_id)
    return {"object": "list", "data": []}


def job_object(job: Job) -> dict[str, Any]:
    """A job, whichever dialect made it."""
    stage = stage_of(job)
    asked = {"accel_type": "H100", "n_accel": 1, "n_node": 1, **job.request.get("infrastructure_config", {})}
    label, select, lora = job.metadata.get(LABEL, ""), stage["data"]["select"], stage["lora"]
    return {
        "id": job.id,
        "fine_tune_type": "STANDARD" if is_sft(stage) else "PREFERENCE",
        "training_files": list(stage["data"]["train"]),
        "validation_files": [select] if isinstance(select, str) else [],
        "model": job.model,
        "accel_type": asked["accel_type"],
        "n_accel": asked["n_accel"],
        "n_node": asked["n_node"],
        "n_epochs": max(1, round(stage["epochs"])),
        "batch_size": stage["pairs_per_step"],
        "learning_rate": lr_of(stage),
        "lora_config": None if stage["adapter"] == "full" else {
            "r": lora["rank"], "alpha": max(1, round(lora["alpha"])), "dropout": lora["dropout"], "bias": "none", "extras": {},
        },
        "beta": None if is_sft(stage) else beta_of(stage),
        # another dialect's job may leave it to the machine, which this one has no word for
        "gradient_checkpointing": {"on": True, "off": False}.get(stage["gradient_checkpointing"]),
        "created_at": zulu(job.created_at),
        "experiment_name": job.request.get("training_config", {}).get("experiment_name") or job.name,
        "status": "deleted" if job.deleted_at else STATUS[job.status],
        "deleted_at": zulu(job.deleted_at),
        "events": None,
        "inference_available": job.status == "succeeded" and not job.result.get("is_demoted"),
        "project_id": int(label) if label.isdecimal() else None,
        "completed_at": zulu(job.finished_at) if job.status == "succeeded" else None,
        "description": None,
        "error_analysis": job.error.get("message"),
        **own_words(job),
    }  # fmt: skip


def _events(request: Request, job: Job) -> list[dict[str, Any]]:
    """A point for each step, with what was measured on held-out rows and the probe at that step beside it."""
    points: dict[int, dict[str, Any]] = {}
    for event in metrics_of(platform_of(request), job):
        numbers = event.data["metrics"]
        if is_held_out(event):
            if event.step in points:
                points[event.step] |= {f"eval_{name.removeprefix('eval_')}": value for name, value in numbers.items()}
        else:
            points[event.step or 0] = {
                **numbers, "object": "fine-tune-event", "created_at": zulu(event.created_at), "step": event.step,
                "loss": numbers["loss"], "epoch": numbers.get("epoch"),
            }  # fmt: skip
    return list(points.values())
