"""Where jobs live: the store, the artifacts and the folders of one installation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from preftune.app.context import Context
from preftune.store.artifacts import Artifacts
from preftune.store.base import Conflict, Query, Store
from preftune.store.opening import default_url, open_store
from preftune.store.records import Event, Level, Project

DEFAULT_PROJECT = "default"
MAX_UPLOAD = 50 << 30


@dataclass(frozen=True, slots=True)
class Platform:
    """One installation.

    store, artifacts: state and bytes. home: folders of jobs on this machine. context: caches of training.
    """

    store: Store
    artifacts: Artifacts
    home: Path
    context: Context

    @classmethod
    def open(cls, context: Context | None = None, *, database: str | None = None, artifacts: str | None = None) -> Self:
        """The installation that the arguments, PREFTUNE_DATABASE and PREFTUNE_ARTIFACTS, or PREFTUNE_HOME name."""
        place = context or Context.from_environment()
        store, bytes_, home = cls.places(place, database=database, artifacts=artifacts)
        platform = cls(store, bytes_, home, place)
        platform.project(DEFAULT_PROJECT)
        return platform

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()

    @staticmethod
    def places(
        context: Context | None = None, *, database: str | None = None, artifacts: str | None = None
    ) -> tuple[Store, Artifacts, Path]:
        """Store, artifacts and folder of an installation that may be empty still."""
        place = context or Context.from_environment()
        url = database or os.environ.get("PREFTUNE_DATABASE") or default_url(place.state)
        folder = artifacts or os.environ.get("PREFTUNE_ARTIFACTS") or str(place.state / "artifacts")
        return open_store(url), Artifacts(folder), place.state

    def project(self, name: str) -> Project:
        """The project of that name, made where there is none."""
        while True:
            found = self.store.page(Project, Query(None, {"name": name}, limit=1)).items
            if found:
                return found[0]
            serial = 1 + self.store.count(Project, Query(None))
            project_id = f"proj_{name}" if name == DEFAULT_PROJECT else f"proj_{os.urandom(8).hex()}"
            try:
                return self.store.insert(Project(id=project_id, project=project_id, name=name, serial=serial))
            except Conflict:
                continue  # somebody else made it, or took the number, in between

    def job_folder(self, job: str) -> Path:
        """Where a job's process reads its task and leaves its run."""
        return self.home / "jobs" / job


def event(subject: str, project: str, type_: str, message: str, *, level: Level = "info", **data: object) -> Event:
    """A new event about a job or a model; ``step`` among the data has a place of its own."""
    step = data.pop("step", None)
    number = step if isinstance(step, int) else None
    return Event(
        id=f"ftevent-{os.urandom(12).hex()}",
        project=project,
        subject=subject,
        type=type_,
        message=message,
        level=level,
        step=number,
        data=data,
    )
