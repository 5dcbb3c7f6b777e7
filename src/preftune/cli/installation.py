"""What the verbs of jobs work on: the installation of this machine, or a server elsewhere; the same words from both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from preftune.core import api
from preftune.core.errors import UsageError

if TYPE_CHECKING:
    from preftune.app.jobs.platform import Platform
    from preftune.sdk import Client
    from preftune.store.records import Job

T = TypeVar("T")
FOLLOW_SECONDS = 0.5


def server() -> str | None:
    """The server that --server or PREFTUNE_SERVER names."""
    root = click.get_current_context().find_root()
    given = root.params.get("server")
    return str(given) if given else None


def typed_server() -> str | None:
    """The server that --server names. Verbs that work on this machine's own files and models, such as ``check``, go to a server
    only by it: nobody uploads data because a variable is set."""
    root = click.get_current_context().find_root()
    is_typed = root.get_parameter_source("server") == click.core.ParameterSource.COMMANDLINE
    return server() if is_typed else None


class Installation(Protocol):
    """Jobs, models and files, wherever they are."""

    def jobs(self) -> Iterator[api.Job]:
        """Jobs, newest first."""

    def models(self) -> Iterator[api.Model]:
        """Models, newest first."""

    def files(self) -> Iterator[api.File]:
        """Files, newest first."""

    def job(self, job_id: str) -> api.JobDetail:
        """One job."""

    def events(self, job_id: str, *, follow: bool) -> Iterator[api.Event]:
        """What happened to a job, oldest first; with ``follow`` until it has ended."""

    def logs(self, job_id: str) -> Iterator[str]:
        """What a job's process printed."""

    def act(self, job_id: str, action: str) -> api.JobDetail:
        """Cancel, pause or resume a job."""


@contextmanager
def reached(there: Callable[[Client], T], here: Callable[[Platform], T]) -> Iterator[T]:
    """What is made of the server that the command line speaks of, or of this machine's own installation."""
    address = server()
    if address is not None:
        from preftune.sdk import Client

        with Client(address) as client:
            yield there(client)
        return
    import logging

    from preftune.app.jobs.platform import Platform

    logging.getLogger("alembic").setLevel(logging.WARNING)
    with Platform.open() as platform:
        yield here(platform)


def opened() -> AbstractContextManager[Installation]:
    """The installation that the command line speaks of."""
    return reached(_There, _Here)


class _There:
    def __init__(self, client: Client) -> None:
        self._client = client

    def jobs(self) -> Iterator[api.Job]:
        return self._client.jobs.list()

    def models(self) -> Iterator[api.Model]:
        yield from self._client.models.list()
        yield from self._client.models.base()

    def files(self) -> Iterator[api.File]:
        return self._client.files.list()

    def job(self, job_id: str) -> api.JobDetail:
        return self._client.jobs.get(job_id)

    def events(self, job_id: str, *, follow: bool) -> Iterator[api.Event]:
        return self._client.jobs.events(job_id, follow=follow)

    def logs(self, job_id: str) -> Iterator[str]:
        return self._client.jobs.logs(job_id)

    def act(self, job_id: str, action: str) -> api.JobDetail:
        jobs = self._client.jobs
        return {"cancel": jobs.cancel, "pause": jobs.pause, "resume": jobs.resume}[action](job_id)


class _Here:
    """The operator's own view: every project's."""

    def __init__(self, platform: Platform) -> None:
        from preftune.server.native import shown

        self._platform, self._shown = platform, shown

    def jobs(self) -> Iterator[api.Job]:
        from preftune.server.lookup import every
        from preftune.store.records import Job

        return map(self._shown.job, every(self._platform, Job, None, {"work": ("train", "evaluate")}))

    def models(self) -> Iterator[api.Model]:
        from preftune.server.lookup import every
        from preftune.store.records import ModelVersion

        return map(self._shown.model, every(self._platform, ModelVersion, None, {}))

    def files(self) -> Iterator[api.File]:
        from preftune.server.lookup import every
        from preftune.store.records import File

        return map(self._shown.file, every(self._platform, File, None, {}))

    def job(self, job_id: str) -> api.JobDetail:
        return self._shown.job_detail(self._kept(job_id))

    def events(self, job_id: str, *, follow: bool) -> Iterator[api.Event]:
        """A job's events, oldest first; with ``follow`` until it has ended and all are told."""
        import time

        from preftune.store.base import Query
        from preftune.store.records import Event

        job, after = self._kept(job_id), None
        while True:
            is_ended = self._kept(job_id).status in api.ENDED
            query = Query(job.project, {"subject": job.id}, after, limit=1000, is_newest_first=False)
            page = self._platform.store.page(Event, query)
            for one in page.items:
                yield self._shown.event(one)
                after = one.id
            if page.has_more:
                continue
            if is_ended or not follow:
                return
            time.sleep(FOLLOW_SECONDS)

    def logs(self, job_id: str) -> Iterator[str]:
        from preftune.app.jobs.logs import read_log

        job, after, has_more = self._kept(job_id), 0, True
        while has_more:
            text, after, has_more = read_log(self._platform, job.id, after)
            yield text

    def act(self, job_id: str, action: str) -> api.JobDetail:
        from preftune.app.jobs import states

        do = {"cancel": states.cancel, "pause": states.pause, "resume": states.resume}[action]
        return self._shown.job_detail(do(self._platform, self._kept(job_id)))

    def _kept(self, job_id: str) -> Job:
        from preftune.store.records import Job

        job = self._platform.store.get(Job, job_id, with_deleted=True)
        if job is None:
            raise UsageError(f"there is no job {job_id!r} in this installation; `preftune ls jobs` lists them")
        return job


def job_lines(job: api.JobDetail) -> list[str]:
    """A job for a person."""
    lines = [f"{job.id}  {job.status}  {job.model} -> {job.name}  {job.created_at:%Y-%m-%d %H:%M}"]
    for stage in job.recipe.get("stages", ()):
        loss = ", ".join(f"{key} {value}" for key, value in stage.get("loss", {}).items())
        lines.append(f"stage {stage.get('name') or stage.get('method')}  {stage.get('adapter', '')}  {loss}".rstrip())
    at = job.progress
    if at.step:
        words = ", ".join(f"{key} {value:.4g}" for key, value in at.metrics.items() if key in _TOLD)
        lines.append(f"step {at.step}{'' if at.steps is None else f' of {at.steps}'}  {words}".rstrip())
    if job.error is not None:
        lines.append(f"error {job.error.code}: {job.error.message}")
    return lines


_TOLD = ("loss", "rewards/accuracies", "rewards/margins")


def event_line(event: api.Event) -> str:
    """An event for a person; what cannot be printed is escaped."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in event.message)
    return f"{event.created_at:%Y-%m-%d %H:%M:%S}  {event.level:<5}  {text}"
