"""Records of the store in the words of the native API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from preftune.app.jobs.platform import Platform
from preftune.core import api
from preftune.server.job_views import fraction_of, seconds_left, total_steps
from preftune.store.records import Alias, Audit, Event, File, Job, Key, ModelVersion, Project, Webhook


def file(record: File) -> api.File:
    """A file."""
    return api.File(
        id=record.id, filename=record.filename, purpose=record.purpose, bytes=record.bytes, sha256=record.sha256,
        status=record.status, format=record.format, num_rows=record.num_rows, error=record.report.get("error"),
        created_at=record.created_at,
    )  # fmt: skip


def report(record: File) -> api.FileReport:
    """What validation found of a file."""
    found = record.report
    return api.FileReport(
        file=record.id, valid=found.get("valid"), format=record.format, num_rows=record.num_rows,
        num_excluded=found.get("num_excluded", 0), bad_rows=tuple(api.BadRow(**row) for row in found.get("bad_rows", ())),
        kinds=found.get("kinds", {}), annotators=tuple(found.get("annotators", ())), error=found.get("error"),
    )  # fmt: skip


def job(record: Job) -> api.Job:
    """A job."""
    return api.Job(**_job(record))


def job_detail(record: Job) -> api.JobDetail:
    """A job with its recipe."""
    return api.JobDetail(**_job(record), recipe=record.recipe, no_probe=record.no_probe)


def _job(record: Job) -> dict[str, Any]:
    error = record.error
    return {
        "id": record.id, "work": record.work, "status": record.status, "dialect": record.dialect, "model": record.model,
        "name": record.name, "files": record.files, "metadata": record.metadata, "priority": record.priority,
        "attempts": record.attempt, "asked": record.asked, "progress": _progress(record), "result": finite(record.result),
        "error": api.JobError(code=error.get("code", "error"), message=error.get("message", ""), param=error.get("param"))
        if error else None,
        "created_at": record.created_at, "started_at": record.started_at, "finished_at": record.finished_at,
    }  # fmt: skip


def _progress(record: Job) -> api.Progress:
    if record.work != "train":
        return api.Progress()
    told = record.progress
    return api.Progress(
        stage=str(told["stage"]).partition("-")[2] if "stage" in told else None, step=told.get("step", 0),
        steps=total_steps(record), fraction=fraction_of(record), seconds_left=seconds_left(record),
        metrics={key: value for key, value in told.get("metrics", {}).items() if math.isfinite(value)},
    )  # fmt: skip


def event(record: Event) -> api.Event:
    """An event."""
    return api.Event(
        id=record.id, subject=record.subject, type=record.type, level=record.level, message=record.message, step=record.step,
        data=finite(record.data), created_at=record.created_at,
    )  # fmt: skip


def metrics(record: Event) -> api.Metrics:
    """The numbers of an event of type ``metrics``."""
    numbers: dict[str, Any] = record.data["metrics"]
    kind: api.MetricsKind = (
        "eval" if any(key.startswith("eval_") for key in numbers) else "step" if "loss" in numbers else "probe"
    )
    return api.Metrics(
        id=record.id, step=record.step or 0, stage=str(record.data.get("stage", "")).partition("-")[2], kind=kind,
        metrics=finite(numbers), created_at=record.created_at,
    )  # fmt: skip


def model(record: ModelVersion) -> api.Model:
    """A model version; where its weights lie is nobody's business."""
    numbers = record.facts.get("metrics", {})
    return api.Model(
        id=record.id, name=record.name, version=record.version, form=record.form, base=record.base or None,
        parent=record.parent or None, job=record.job or None, step=record.step, files=record.datasets,
        metrics={key: finite(value) for key, value in numbers.items() if isinstance(value, (int, float))},
        created_at=record.created_at,
    )  # fmt: skip


def alias(platform: Platform, record: Alias) -> api.Alias:
    """An alias with the name of what it points to."""
    target = platform.store.get(ModelVersion, record.model)
    return api.Alias(
        id=record.id, name=record.name, model=record.model, model_name=target.name if target else None,
        updated_at=record.updated_at,
    )  # fmt: skip


def webhook(record: Webhook) -> api.Webhook:
    """A webhook without its secret."""
    return api.Webhook(id=record.id, url=record.url, events=record.events, name=record.name, created_at=record.created_at)


def key(record: Key) -> api.Key:
    """A key without its hash."""
    return api.Key(
        id=record.id, name=record.name, role=record.role, prefix=record.prefix, project=record.project,
        created_at=record.created_at, last_used_at=record.last_used_at, revoked_at=record.revoked_at,
    )  # fmt: skip


def project(record: Project) -> api.Project:
    """A project."""
    return api.Project(id=record.id, name=record.name, description=record.description, created_at=record.created_at)


def audit(record: Audit) -> api.AuditEntry:
    """An entry of the audit log."""
    return api.AuditEntry(
        id=record.id, actor=record.actor, action=record.action, target=record.target, detail=finite(record.detail),
        created_at=record.created_at,
    )  # fmt: skip


def finite(value: Any) -> Any:
    """The same JSON with null in the place of NaN and infinities, which JSON has no word for.

    >>> finite({"loss": float("nan"), "rows": [1.5]})
    {'loss': None, 'rows': [1.5]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value
