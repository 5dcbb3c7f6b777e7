"""The names that a client may ask: models and checkpoints, their ids, aliases, and jobs that made one."""

from __future__ import annotations

from preftune.app.jobs.aliases import find_alias
from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.store.records import Job, ModelVersion


def served_model(platform: Platform, project: str, name: str) -> ModelVersion:
    """The model that a name means in a project; a tuned one is there as soon as its job has succeeded.

    Raises
        UsageError: no such model; the message lists those that there are.
    """
    alias = find_alias(platform, project, name)
    if alias is not None:
        return find_model(platform, project, alias.model)
    job_id, _, step = name.partition(":")
    job = platform.store.get(Job, job_id, project) if job_id.startswith("ft-") else None
    if job is not None and job.status != "succeeded":
        raise UsageError(f"job {job_id} is {job.status}; its model can be asked once it has succeeded")
    if job is not None:
        return find_model(platform, project, f"{job.name}:{step}" if step else job.id)
    return find_model(platform, project, name)
