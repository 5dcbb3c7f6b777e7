"""What may be done to a job, and what it becomes.

validating -> queued -> running -> exporting -> succeeded
cancel: before running at once, else when the process has checkpointed; pause likewise, resume queues it again
failed and cancelled jobs may be retried; an ended job may be deleted
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from preftune.app.jobs import reporting
from preftune.app.jobs.platform import Platform, event
from preftune.core.errors import PreftuneError, UsageError
from preftune.store.base import Conflict, Query, every
from preftune.store.records import ACTIVE, ENDED, File, Job, now


class WrongState(PreftuneError):
    """What was asked cannot be done to the job as it is."""


def active_jobs(platform: Platform, project: str) -> Iterator[Job]:
    """The jobs of a project that have not ended."""
    return every(platform.store, Job, Query(project, {"status": ACTIVE}, limit=1000))


def submit(platform: Platform, job: Job) -> Job:
    """Keep a new job; it waits for its files. The same idempotency key with the same request gives the job of before.

    Raises
        UsageError: the key was used for another request; or a file that does not exist or cannot be used.
    """
    for file_id in job.files:
        file = platform.store.get(File, file_id, job.project)
        if file is None:
            raise UsageError(f"there is no file {file_id!r}; upload it first")
        if file.status == "error":
            raise UsageError(f"file {file_id!r} cannot be used: {file.report.get('error', 'it is not valid')}")
    try:
        kept = platform.store.insert(job, [event(job.id, job.project, "created", "the job was created")])
    except Conflict:
        found = platform.store.page(Job, Query(job.project, {"idempotency": job.idempotency}, with_deleted=True)).items
        if job.idempotency is None or not found:
            raise
        if found[0].request != job.request:
            raise UsageError(f"idempotency key {job.idempotency!r} was used for another request; use a new one") from None
        return found[0]
    return advance(platform, kept)


def advance(platform: Platform, job: Job) -> Job:
    """A validating job as it should be now: queued where all files are processed, failed where one is not valid."""
    files = [(file_id, platform.store.get(File, file_id, job.project)) for file_id in job.files]
    for file_id, file in files:
        if file is None or file.status == "error":
            why = "it was deleted" if file is None else file.report.get("error", "it is not valid")
            message = f"file {file_id!r} cannot be used: {why}"
            error = {"code": "invalid_training_file", "message": message, "param": "training_file"}
            said = event(job.id, job.project, "failed", message, level="error")
            return (
                _become(platform, job, {"status": "failed", "error": error, "finished_at": now()}, ("validating",), [said]) or job
            )
    if all(file is not None and file.status == "processed" for _, file in files):
        said = event(job.id, job.project, "queued", "files are valid; the job waits for a worker")
        return _become(platform, job, {"status": "queued"}, ("validating",), [said]) or job
    return job


def cancel(platform: Platform, job: Job) -> Job:
    """Cancel a job: at once where nothing runs, else its process is asked to checkpoint and end."""
    done = {"status": "cancelled", "asked": "", "finished_at": now()}
    said = event(job.id, job.project, "cancelled", "the job was cancelled", level="warn")
    changed = _become(platform, job, done, ("validating", "queued", "paused"), [said])
    if changed is None:
        asked = event(job.id, job.project, "cancel_requested", "the job was asked to stop", level="warn")
        changed = _become(platform, job, {"asked": "cancel"}, ("running",), [asked])
    if changed is None:
        raise WrongState(f"job {job.id} has ended or is ending ({_status(platform, job)}); there is nothing to cancel")
    return changed


def pause(platform: Platform, job: Job) -> Job:
    """Pause a job: it keeps its checkpoint and waits until it is resumed."""
    said = event(job.id, job.project, "paused", "the job was paused")
    changed = _become(platform, job, {"status": "paused", "asked": ""}, ("validating", "queued"), [said])
    if changed is None:
        asked = event(job.id, job.project, "pause_requested", "the job was asked to pause")
        changed = _become(platform, job, {"asked": "pause"}, ("running",), [asked])
    if changed is None:
        raise WrongState(f"job {job.id} is {_status(platform, job)}; only a waiting or running job can be paused")
    return changed


def resume(platform: Platform, job: Job) -> Job:
    """Queue a paused job again; it goes on from its last checkpoint."""
    said = event(job.id, job.project, "resumed", "the job was resumed")
    changed = _become(platform, job, {"status": "validating", "asked": ""}, ("paused",), [said])
    if changed is None:
        raise WrongState(f"job {job.id} is {_status(platform, job)}; only a paused job can be resumed")
    return advance(platform, changed)


def retry(platform: Platform, job: Job, reason: str, *, no_probe: bool = False) -> Job:
    """Queue a failed or cancelled job again, with the reason kept; it goes on from its last checkpoint.

    Parameters
        no_probe: from here on nobody asks whether the model can do the task, and the run is not rehearsed.
    """
    said = event(job.id, job.project, "retried", f"the job was queued again: {reason}", reason=reason)
    fresh: dict[str, Any] = {"status": "validating", "asked": "", "error": {}, "finished_at": None, "forgiven": job.attempt}
    fresh |= {"no_probe": True} if no_probe else {}
    changed = _become(platform, job, fresh, ("failed", "cancelled"), [said])
    if changed is None:
        raise WrongState(f"job {job.id} is {_status(platform, job)}; only a failed or cancelled job can be retried")
    return advance(platform, changed)


def delete(platform: Platform, job: Job) -> None:
    """Take an ended job out of every list; its models stay."""
    if _become(platform, job, {"deleted_at": now()}, ENDED, []) is None:
        raise WrongState(f"job {job.id} is {_status(platform, job)}; cancel it before it is deleted")
    reporting.forget(platform, job)


def _become(platform: Platform, job: Job, changes: Mapping[str, Any], before: tuple[str, ...], events: list[Any]) -> Job | None:
    return platform.store.change(Job, job.id, {**changes, "updated_at": now()}, expect={"status": before}, events=events)


def _status(platform: Platform, job: Job) -> str:
    current = platform.store.get(Job, job.id, with_deleted=True)
    return "gone" if current is None else current.status
