"""What a route's path names, in the caller's project; 404 where it is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.server.errors import not_found
from preftune.server.security import Caller
from preftune.store import base
from preftune.store.base import Query, R
from preftune.store.records import File, Job, ModelVersion, Resource


def platform_of(request: Request) -> Platform:
    """The installation behind the server."""
    platform: Platform = request.app.state.platform
    return platform


def file_of(request: Request, caller: Caller, file_id: str) -> File:
    """A file by its id."""
    file = platform_of(request).store.get(File, file_id, caller.project)
    if file is None:
        raise not_found("file", file_id)
    return file


def training_job(request: Request, caller: Caller, job_id: str, *, with_deleted: bool = False) -> Job:
    """A fine-tuning job by its id, whichever dialect made it."""
    job = platform_of(request).store.get(Job, job_id, caller.project, with_deleted=with_deleted)
    if job is None or job.work != "train":
        raise not_found("fine-tuning job", job_id)
    return job


def native_job(request: Request, caller: Caller, job_id: str, *, with_deleted: bool = False) -> Job:
    """A job of any kind by its id; the native API shows them all."""
    job = platform_of(request).store.get(Job, job_id, caller.project, with_deleted=with_deleted)
    if job is None:
        raise not_found("job", job_id)
    return job


def model_of(request: Request, caller: Caller, name: str) -> ModelVersion:
    """A model by its name, ``NAME:STEP`` or id."""
    try:
        return find_model(platform_of(request), caller.project, name)
    except UsageError:
        raise not_found("model", name) from None


def resource_of(request: Request, caller: Caller, type_: str, resource_id: str) -> Resource:
    """A thing of one dialect by its id."""
    found = platform_of(request).store.get(Resource, resource_id, caller.project)
    if found is None or found.type != type_:
        raise not_found(type_.rpartition(".")[2].replace("_", " "), resource_id)
    return found


def every(
    platform: Platform,
    kind: type[R],
    project: str | None,
    where: dict[str, Any],
    *,
    is_newest_first: bool = True,
    size: int = 1000,
    after: str | None = None,
) -> Iterator[R]:
    """Every record of a list, page by page. size: records of a page. after: the record before the first one."""
    return base.every(platform.store, kind, Query(project, where, after, size, is_newest_first))
