"""What an installation's store no longer names: folders of deleted jobs, and bytes among the artifacts.

A job that runs, waits or may be retried is in the store and keeps everything. Whatever the store names stays, and what it has
never named goes only where it knows the others: a gc that was pointed to another database deletes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preftune.app.context import Context
from preftune.app.holding import holders
from preftune.app.jobs.child import RUN, TASK
from preftune.app.jobs.evaluations import rows_key
from preftune.app.jobs.platform import Platform
from preftune.core.files import TEMPORARY_PREFIX
from preftune.store.base import MAX_PAGE, Query, R, Store, every
from preftune.store.records import DatasetVersion, File, Job, ModelVersion, Upload

DAY = 86_400.0
DATABASE = "PREFTUNE_DATABASE"
STRANGE = "the database names none of them; is it the right one? (PREFTUNE_DATABASE, PREFTUNE_HOME)"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Something that nothing names: a folder, or an artifact under its key; and why it may go."""

    place: Path | str
    num_bytes: int
    reason: str


def opened(context: Context) -> Platform | None:
    """The installation of a state folder, or None where there is none yet: looking makes no database."""
    if not os.environ.get(DATABASE) and not (context.state / "preftune.db").is_file():
        return None
    return Platform.open(context)


def forgotten_folders(platform: Platform, kept: list[str]) -> Iterator[Forgotten]:
    """Folders of jobs that were deleted, or that no record names, unless a model lives in them or somebody needs them."""
    root = platform.home / "jobs"
    folders = [one for one in sorted(root.glob("*")) if one.is_dir() and not one.name.startswith(TEMPORARY_PREFIX)]
    jobs = {job.id: job for job in _every(platform.store, Job)}
    gone = [folder for folder in folders if folder.name not in jobs or jobs[folder.name].deleted_at is not None]
    if folders and not any(folder.name in jobs for folder in folders):
        kept.append(f"{root}: {len(folders)} folders of jobs; {STRANGE}")
        return
    models = _needed_models(platform.store)
    going_on = [folder / TASK for folder in folders if folder.name in jobs and _may_go_on(jobs[folder.name])]
    tasks = [path.read_text("utf-8") for path in going_on if path.is_file()]
    for folder in gone:
        # by the job's id, which is in every path of its folder, however the path was written: relative, or through a link
        names = sorted({model.name for model in models if folder.name in Path(model.run).parts})
        if names:
            kept.append(f"{folder}: its job was deleted, its models stay ({', '.join(names)}); delete them and it can go")
        elif any(folder.name in task for task in tasks):
            kept.append(f"{folder}: its job was deleted; a job that may go on starts from it")
        elif users := [*holders(folder), *holders(folder / RUN)]:
            kept.append(f"{folder}: in use by process {users[0].pid} on {users[0].host}")
        elif folder.name in jobs:
            yield Forgotten(folder, _bytes(folder), "its job was deleted")
        elif _age(folder) > DAY:
            yield Forgotten(folder, _bytes(folder), "no job of this name is known")


def forgotten_artifacts(platform: Platform, kept: list[str]) -> Iterator[Forgotten]:
    """Bytes that no record names and that are older than a day: an upload's bytes come before its record."""
    named = _named(platform.store)
    found = list(platform.artifacts.entries())
    if found and not any(entry.key in named for entry in found):
        kept.append(f"{platform.artifacts.url}: {len(found)} artifacts; {STRANGE}")
        return
    for entry in found:
        if entry.key not in named and time.time() - entry.modified > DAY:
            yield Forgotten(entry.key, entry.bytes, "no record names it")


def _may_go_on(job: Job) -> bool:
    """Whether a process of the job runs or may run again."""
    return job.deleted_at is None and job.status != "succeeded"


def _needed_models(store: Store) -> list[ModelVersion]:
    """Models that were not deleted, and those beneath them: an adapter reads its base's weights."""
    every = {model.id: model for model in _every(store, ModelVersion)}
    needed, left = {}, [model for model in every.values() if model.deleted_at is None]
    while left:
        model = left.pop()
        if model.id not in needed:
            needed[model.id] = model
            left += [every[one] for one in (model.base, model.parent) if one in every]
    return list(needed.values())


def _named(store: Store) -> set[str]:
    """Keys of artifacts that records name."""
    keys = {file.artifact for file in _every(store, File) if file.deleted_at is None}
    keys |= {one.artifact for one in _every(store, DatasetVersion)}
    for upload in _every(store, Upload):
        if upload.status == "pending":
            keys |= {str(part["key"]) for part in upload.parts.values()}
    for model in _every(store, ModelVersion):
        if model.deleted_at is None:
            keys |= {model.artifact, *(f"exports/{model.id}/{form}.tar.gz" for form in ("merged", "adapter"))}
    keys |= {rows_key(job.id) for job in _every(store, Job) if job.work == "evaluate" and job.deleted_at is None}
    return keys - {""}


def _every(store: Store, kind: type[R]) -> Iterator[R]:
    """All records of a kind, deleted ones too."""
    return every(store, kind, Query(None, limit=MAX_PAGE, is_newest_first=False, with_deleted=True))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _age(folder: Path) -> float:
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
