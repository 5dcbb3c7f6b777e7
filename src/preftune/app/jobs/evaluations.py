"""Evaluations as jobs: asked for by a dialect, done in a process of their own, their rows kept among the artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from preftune.app.grading.asking import TOKEN_VARIABLE
from preftune.app.jobs import contests, states, vault
from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.store.records import File, Job, new_id, now

CHUNK = 1 << 20
SIDES = ("model_a", "model_b", "model_to_evaluate", "judge", "sample")


def rows_key(job_id: str) -> str:
    """Where the judged rows of an evaluation are kept."""
    return f"evaluations/{job_id}.jsonl"


def submit_evaluation(platform: Platform, job: Job, token: str | None = None) -> Job:
    """Queue an evaluation; ``recipe`` is its task with names of models and the file's id. A token is kept encrypted.

    Raises
        UsageError: a model or a file that is not there.
    """
    for name in _names(job.recipe):
        find_model(platform, job.project, name)
    if token:
        secret = vault.keep(platform, job.project, f"evaluation:{job.id}", token)
        job = job.model_copy(update={"recipe": {**job.recipe, "secret": secret.id}})
    return states.submit(platform, job)


def keep_rows(platform: Platform, project: str, rows: list[Any]) -> File:
    """Rows that came with a request, as a file of the project."""
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    file_id = new_id("file-")
    stored = platform.artifacts.put(f"files/{file_id}.jsonl", [content])
    return platform.store.insert(
        File(
            id=file_id, project=project, filename="rows.jsonl", purpose="evals", bytes=stored.bytes, sha256=stored.sha256,
            status="processed", artifact=stored.key, num_rows=len(rows),
        )
    )  # fmt: skip


def evaluation_task(platform: Platform, job: Job) -> dict[str, Any]:
    """What the process of an evaluation is told: folders and a path in the place of names and ids.

    Raises
        UsageError: a model or the file was deleted.
    """
    if job.recipe["kind"] == contests.KIND:
        return contests.contest_task(platform, job)
    file = platform.store.get(File, job.files[0], job.project)
    if file is None:
        raise UsageError(f"file {job.files[0]!r} was deleted")
    task = {key: value for key, value in job.recipe.items() if key != "secret"}
    for key in SIDES:
        if isinstance(task.get(key), Mapping):
            task[key] = _placed(platform, job.project, task[key])
    task["models"] = {name: _placed(platform, job.project, {"model": name}) for name in task.get("models", ())}
    path = platform.artifacts.local(file.artifact, platform.context.cache / "artifacts")
    return {**task, "work": "evaluate", "path": str(path)}


def environment_of(platform: Platform, job: Job) -> dict[str, str]:
    """What the process's environment holds beside the worker's: the token of an external model, nowhere else in the clear."""
    secret = job.recipe.get("secret")
    return {} if not secret else {TOKEN_VARIABLE: vault.read(platform, secret, job.project)}


def keep_result(platform: Platform, job: Job, rows: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Keep the judged rows; the result of the job, with the id of a file for those who fetch it as one."""
    with rows.open("rb") as file:
        stored = platform.artifacts.put(rows_key(job.id), iter(lambda: file.read(CHUNK), b""))
    if job.dialect != "together":
        return report
    made = File(
        id=f"file-{job.id.rpartition('-')[2]}", project=job.project, filename=f"{job.id}.jsonl", purpose="eval",
        bytes=stored.bytes, sha256=stored.sha256, status="processed", artifact=stored.key,
    )  # fmt: skip
    if platform.store.get(File, made.id) is None:
        platform.store.insert(made)
    return {**report, "result_file_id": made.id}


def rows_of(platform: Platform, job: Job) -> Iterator[dict[str, Any]]:
    """The judged rows of a finished evaluation, in their order."""
    if not platform.artifacts.exists(rows_key(job.id)):
        return
    with platform.artifacts.open(rows_key(job.id)) as file:
        for line in file:
            yield json.loads(line)


def cancel_evaluation(platform: Platform, job: Job) -> Job:
    """Cancel an evaluation that has not ended; one that has stays as it is."""
    if job.status in {"succeeded", "failed", "cancelled"}:
        return job
    return states.cancel(platform, job)


def ended_at(job: Job) -> str:
    """When an evaluation changed last, as ISO 8601."""
    return (job.finished_at or job.updated_at or now()).isoformat()


def _names(task: Mapping[str, Any]) -> list[str]:
    """The registered models that a task asks."""
    found = [str(name) for name in task.get("models", ())]
    for key in SIDES:
        spec = task.get(key)
        if isinstance(spec, Mapping) and not spec.get("url"):
            found.append(str(spec["model"]))
    return found


def _placed(platform: Platform, project: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    if spec.get("url"):
        return dict(spec)
    return {**spec, "folder": find_model(platform, project, str(spec["model"])).run}
