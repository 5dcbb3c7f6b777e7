"""What the dialects say of a job in common: its stage, how far it is, its checkpoints and its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from preftune.app.jobs.platform import Platform
from preftune.core.rounds import GENERATE
from preftune.server.lookup import every
from preftune.server.recipes import base_lr
from preftune.store.records import Event, Job, ModelVersion


def stage_of(job: Job) -> dict[str, Any]:
    """The first stage of a job that trains, as its recipe has it."""
    stages: list[dict[str, Any]] = job.recipe["stages"]
    return next((stage for stage in stages if stage["method"] != GENERATE), stages[0])


def is_sft(stage: Mapping[str, Any]) -> bool:
    """Whether a stage is supervised; every other method is told as ``dpo`` to clients that know two."""
    return bool(stage["method"] == "sft")


def own_words(job: Job) -> dict[str, Any]:
    """What a dialect's object says beside its own keys, as ``extra_body`` was told: nothing, where nothing was."""
    return {"preftune": {"no_probe": True}} if job.no_probe else {}


def lr_of(stage: Mapping[str, Any]) -> float:
    """The peak learning rate of a stage."""
    return float(stage["lr"]) if stage["lr"] is not None else base_lr(stage["method"], stage["adapter"])


def loss_of(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the loss; of a mix those of its first preference loss, with the weight of sft as ``rpo_alpha``."""
    options = dict(stage["loss"])
    parts: Mapping[str, Mapping[str, Any]] = options.get("parts") or {}
    if stage["method"] == "mix":
        own = next((dict(part) for name, part in parts.items() if name != "sft"), {})
        options = own | ({"rpo_alpha": parts["sft"].get("weight", 1.0)} if "sft" in parts else {})
    return options


def loss_name(stage: Mapping[str, Any]) -> str:
    """The loss of a stage; of a mix its first preference loss."""
    names = [str(stage["method"])]
    if stage["method"] == "mix":
        names = [name for name in stage["loss"].get("parts", {}) if name != "sft"] or names
    return names[0]


def beta_of(stage: Mapping[str, Any]) -> float | None:
    """The beta of a preference stage: as it was given, else its loss's default."""
    options, name = loss_of(stage), loss_name(stage)
    found = options.get("beta", {"dpo": 0.1, "simpo": 2.0}.get(name))
    return None if found is None else float(found)


def fraction_of(job: Job) -> float | None:
    """The share of its training that is done; None where nothing is known yet."""
    stage, step = stage_of(job), job.progress.get("step", 0)
    epoch = job.progress.get("metrics", {}).get("epoch")
    if not step or not epoch:
        return None
    shares = [epoch / stage["epochs"], step / stage["max_steps"] if stage["max_steps"] else 0.0]
    return float(min(1.0, max(shares)))


def total_steps(job: Job) -> int | None:
    """Optimiser steps that the job is expected to take."""
    fraction = fraction_of(job)
    return None if not fraction else max(1, round(job.progress["step"] / fraction))


def seconds_left(job: Job) -> int | None:
    """Seconds of training that are left, if it goes on as it did."""
    fraction, elapsed = fraction_of(job), job.progress.get("metrics", {}).get("elapsed_s")
    return None if not fraction or elapsed is None else max(0, round(elapsed / fraction - elapsed))


def num_tokens(job: Job) -> int:
    """Tokens computed so far."""
    return int(job.progress.get("metrics", {}).get("num_tokens", 0))


def metrics_of(platform: Platform, job: Job) -> Iterator[Event]:
    """The metric events of a job, oldest first: of steps, of held-out evaluations and of the probe."""
    yield from every(platform, Event, job.project, {"subject": job.id, "type": "metrics"}, is_newest_first=False)


def is_held_out(event: Event) -> bool:
    """Whether a metric event tells of held-out rows or of the probe, not of a training step."""
    return "loss" not in event.data["metrics"]


def checkpoints_of(platform: Platform, job: Job) -> list[ModelVersion]:
    """What a finished job left, newest first; the final model is the first and bears the job's name."""
    return list(every(platform, ModelVersion, job.project, {"job": job.id}))
