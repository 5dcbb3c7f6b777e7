"""Where a model comes from: the models it was trained from, their jobs, the files, and who judged their rows."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.app.jobs.models import start_of
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.store.records import File, Job, ModelVersion

MOST = 100  # generations that are followed


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Nearest first. files: id to the file, None where it is gone."""

    parents: list[ModelVersion]
    jobs: list[Job]
    files: dict[str, File | None]


def ancestry_of(platform: Platform, model: ModelVersion) -> Ancestry:
    """Follow a model back to the model that nobody here trained."""
    parents: list[ModelVersion] = []
    jobs: list[Job] = []
    files: dict[str, File | None] = {}
    seen, at = {model.id}, model
    while len(parents) < MOST:
        job = platform.store.get(Job, at.job, model.project, with_deleted=True) if at.job else None
        if job is not None:
            jobs.append(job)
            for file_id in job.files:
                files.setdefault(file_id, platform.store.get(File, file_id, model.project, with_deleted=True))
        parent = _parent(platform, at, job)
        if parent is None or parent.id in seen:
            break
        seen.add(parent.id)
        parents.append(parent)
        at = parent
    return Ancestry(parents, jobs, files)


def _parent(platform: Platform, model: ModelVersion, job: Job | None) -> ModelVersion | None:
    """The model that the job began from: a checkpoint where it names one, else the model's base."""
    start = next((stage.get("from_checkpoint") for stage in job.recipe.get("stages", ())), None) if job is not None else None
    if start:
        try:
            return start_of(platform, model.project, start)
        except UsageError:
            pass  # it was deleted: the base is what is left to tell
    return platform.store.get(ModelVersion, model.base, with_deleted=True) if model.base else None
