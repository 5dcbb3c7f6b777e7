"""Jobs and events in Together's words."""

from __future__ import annotations

from typing import Any

from preftune.app.jobs.platform import Platform
from preftune.server.job_views import (
    beta_of,
    is_sft,
    loss_name,
    loss_of,
    lr_of,
    num_tokens,
    own_words,
    seconds_left,
    stage_of,
    total_steps,
)
from preftune.server.lookup import every
from preftune.server.views import zulu
from preftune.store.records import Event, Job

STATUS = {
    "validating": "pending", "queued": "queued", "running": "running", "exporting": "uploading", "paused": "pending",
    "cancelled": "cancelled", "succeeded": "completed", "failed": "error",
}  # fmt: skip
EVENTS = {
    "created": "job_pending", "queued": "job_pending", "started": "job_start", "checkpoint": "checkpoint_save",
    "succeeded": "job_complete", "failed": "job_error", "cancel_requested": "cancel_requested", "cancelled": "job_stopped",
    "paused": "job_stopped", "resumed": "job_restarted", "requeued": "job_restarted", "retried": "job_restarted",
    "ended_early": "early_stopped",
}  # fmt: skip
LEVELS = {"info": "info", "warn": "warning", "error": "error"}
SIMPO_LIKE = frozenset({"simpo"})


def job_object(job: Job, events: list[dict[str, Any]]) -> dict[str, Any]:
    """A job, whichever dialect made it."""
    stage, request = stage_of(job), job.request
    select, left = stage["data"]["select"], seconds_left(job)
    is_running = job.status in {"running", "exporting"}
    made: list[str] = job.result.get("models", [])
    last = job.result.get("stages", [{}])[-1:] or [{}]
    checkpoints = stage["checkpoints"] + 1
    return {
        "id": job.id,
        "status": "cancel_requested" if job.asked == "cancel" and is_running else STATUS[job.status],
        "user_id": job.project,
        "owner_address": job.project,
        "created_at": zulu(job.created_at),
        "updated_at": zulu(job.updated_at),
        "started_at": zulu(job.started_at),
        "model": job.model,
        "from_checkpoint": stage.get("from_checkpoint"),
        "model_output_name": job.name,
        "model_object_id": made[-1] if made else None,
        "model_object_name": job.name if made else None,
        "training_file": stage["data"]["train"][0],
        "validation_file": select if isinstance(select, str) else "",
        "training_method": _method(stage),
        "training_type": _type(stage),
        "batch_size": stage["pairs_per_step"],
        "learning_rate": lr_of(stage),
        "lr_scheduler": _scheduler(stage),
        "warmup_ratio": stage["warmup"],
        "max_grad_norm": stage["max_grad_norm"] or 0.0,
        "weight_decay": stage["weight_decay"],
        "n_epochs": max(1, round(stage["epochs"])),
        "n_checkpoints": checkpoints,
        "n_evals": stage["evals"],
        "max_seq_length": stage["data"].get("max_length"),
        "suffix": request.get("suffix", ""),
        "random_seed": job.recipe["seed"],
        "token_count": num_tokens(job),
        "total_price": 0,
        "packing": True,
        "early_stopped": bool(last[0].get("ended")),
        "early_stopping_best_step": last[0].get("kept_step") if last[0].get("ended") else None,
        "early_stopping_best_metric": last[0].get("best_value") if last[0].get("ended") else None,
        "wandb_project_name": request.get("wandb_project_name"),
        "wandb_name": request.get("wandb_name"),
        "wandb_entity": request.get("wandb_entity"),
        "progress": {"estimate_available": is_running and left is not None, "seconds_remaining": _remaining(job, left)},
        "events": events,
        **own_words(job),
    }


def event_objects(platform: Platform, job: Job) -> list[dict[str, Any]]:
    """The events of a job, oldest first, without its metrics."""
    types = total_steps(job)
    found = every(platform, Event, job.project, {"subject": job.id}, is_newest_first=False)
    return [_event_object(job, event, types) for event in found if event.type != "metrics"]


def _event_object(job: Job, event: Event, steps: int | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "object": "fine-tune-event",
        "created_at": zulu(event.created_at),
        "type": EVENTS.get(event.type, "warning"),
        "level": LEVELS[event.level],
        "message": event.message,
    }
    if event.step is not None:
        shown |= {"step": event.step, "total_steps": steps}
    if event.type == "checkpoint":
        shown["checkpoint_path"] = f"{job.name}:{event.step}"
    return shown


def _method(stage: dict[str, Any]) -> dict[str, Any]:
    if is_sft(stage):
        return {"method": "sft", "train_on_inputs": "auto"}
    options, name = loss_of(stage), loss_name(stage)
    is_simpo = name in SIMPO_LIKE
    return {
        "method": "dpo",
        "dpo_beta": beta_of(stage),
        "dpo_normalize_logratios_by_length": is_simpo or bool(options.get("length_normalised")),
        "dpo_reference_free": is_simpo or bool(options.get("reference_free")),
        "rpo_alpha": options.get("rpo_alpha") or None,
        "simpo_gamma": options.get("gamma") if is_simpo else None,
    }


def _type(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["adapter"] == "full":
        return {"type": "Full"}
    lora = stage["lora"]
    modules = lora["target_modules"]
    return {
        "type": "Lora", "lora_r": lora["rank"], "lora_alpha": round(lora["alpha"]), "lora_dropout": lora["dropout"],
        "lora_trainable_modules": modules if isinstance(modules, str) else ",".join(modules),
    }  # fmt: skip


def _scheduler(stage: dict[str, Any]) -> dict[str, Any]:
    """A constant rate is a line that ends where it began: the clients know only lines and cosines."""
    if stage["schedule"] == "cosine":
        args = {"min_lr_ratio": stage["min_lr_ratio"], "num_cycles": stage["num_cycles"]}
        return {"lr_scheduler_type": "cosine", "lr_scheduler_args": args}
    floor = 1.0 if stage["schedule"] == "constant" else stage["min_lr_ratio"]
    return {"lr_scheduler_type": "linear", "lr_scheduler_args": {"min_lr_ratio": floor}}


def _remaining(job: Job, left: int | None) -> int:
    """Seconds from the start to the expected end, which is what the command line counts by."""
    elapsed = job.progress.get("metrics", {}).get("elapsed_s", 0.0)
    return 0 if left is None else round(elapsed + left)
