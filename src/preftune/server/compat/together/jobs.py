"""Together's fine-tuning jobs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from preftune.app.jobs import states
from preftune.app.jobs.models import max_tokens_of, start_of
from preftune.core.errors import UsageError
from preftune.server.compat.together.views import event_objects, job_object
from preftune.server.compat.together.wanted import MAX, JobRequest, wanted_of
from preftune.server.errors import not_found
from preftune.server.lookup import every, platform_of, training_job
from preftune.server.recipes import create
from preftune.server.security import CallerOf, audit
from preftune.server.views import whole_list
from preftune.store.records import File, Job

router = APIRouter(prefix="/v1/fine-tunes")
BYTES_A_TOKEN = 4  # a rule of thumb: nobody is billed by the estimate


@router.get("/models/limits")
def limits(request: Request, caller: CallerOf, model_name: str) -> dict[str, Any]:
    """What may be asked for of a model; the clients check before they send a job."""
    try:
        model = start_of(platform_of(request), caller.project, model_name)
    except UsageError:
        raise not_found("model", model_name) from None
    length = max_tokens_of(model)
    batch = {"min_batch_size": 1, "max_batch_size": MAX["batch_size"], "max_batch_size_dpo": MAX["batch_size"]}
    return {
        "model_name": model_name,
        "default_gradient_accumulation_steps": 1,
        "max_num_epochs": MAX["n_epochs"],
        "max_num_evals": MAX["n_evals"],
        "max_num_checkpoints": MAX["n_checkpoints"],
        "min_learning_rate": 1e-9,
        "max_learning_rate": 1.0,
        "min_max_seq_length": 1,
        "max_seq_length_sft": length,
        "max_seq_length_dpo": length,
        "merge_output_lora": True,
        "supports_full_training": True,
        "supports_reasoning": False,
        "supports_tools": True,
        "supports_vision": False,
        "lora_training": {**batch, "default_rank": 16, "max_rank": MAX["lora_r"], "target_modules": ["all-linear"]},
        "full_training": batch,
    }


class Estimate(BaseModel):
    """What a job would be; unset numbers come as 0 and unset names empty, so nothing else of it is looked at."""

    model_config = ConfigDict(extra="ignore")
    training_file: str | None = None
    validation_file: str | None = None
    n_epochs: float | None = None
    n_evals: float | None = None


@router.post("/estimate-price")
def estimate_price(request: Request, caller: CallerOf, body: Estimate) -> dict[str, Any]:
    """Nothing costs anything; the number of tokens is a guess by the size of the files."""
    counts: list[float] = []
    for file_id, name in ((body.training_file, "train"), (body.validation_file, "eval")):
        file = platform_of(request).store.get(File, str(file_id), caller.project) if file_id else None
        if file_id and file is None:
            raise not_found("file", str(file_id))
        if file is not None and file.status == "error":
            return {"estimation_available": False, "unavailable_reason": f"{name}_file_invalid"}
        counts.append(0 if file is None else file.bytes // BYTES_A_TOKEN)
    return {
        "estimation_available": True,
        "allowed_to_proceed": True,
        "estimated_total_price": 0.0,
        "estimated_train_token_count": counts[0] * (body.n_epochs or 1),
        "estimated_eval_token_count": counts[1] * (body.n_evals or 0),
        "user_limit": 0.0,
    }


@router.post("")
def create_job(request: Request, caller: CallerOf, body: JobRequest) -> dict[str, Any]:
    """Create a fine-tuning job."""
    platform = platform_of(request)
    wanted = wanted_of(platform, caller.project, body, request.headers.get("idempotency-key"))
    job = create(platform, caller, wanted)
    return job_object(job, []) | {"adapter_output_name": None}


@router.get("")
def list_jobs(request: Request, caller: CallerOf) -> Response:
    """Every fine-tuning job, newest first, without its events."""
    found = every(platform_of(request), Job, caller.project, {"work": "train"})
    return whole_list(job_object(job, []) for job in found)


@router.get("/{job_id}")
def get_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """One job with its events."""
    platform, job = platform_of(request), training_job(request, caller, job_id)
    return job_object(job, event_objects(platform, job))


@router.post("/{job_id}/cancel")
def cancel_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """Cancel a job; a running one checkpoints first."""
    caller.must_be("developer")
    platform = platform_of(request)
    job = states.cancel(platform, training_job(request, caller, job_id))
    audit(platform, caller, "job.cancel", job_id)
    return job_object(job, [])


@router.delete("/{job_id}")
def delete_job(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """Delete a job that has ended; its models stay."""
    caller.must_be("developer")
    states.delete(platform_of(request), training_job(request, caller, job_id))
    audit(platform_of(request), caller, "job.delete", job_id)
    return {"message": f"job {job_id} was deleted; its models are kept"}


@router.get("/{job_id}/events")
def job_events(request: Request, caller: CallerOf, job_id: str) -> dict[str, Any]:
    """What happened to a job, oldest first; metrics have a route of their own."""
    platform = platform_of(request)
    return {"data": event_objects(platform, training_job(request, caller, job_id))}
