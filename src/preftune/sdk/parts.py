"""The nouns of ``preftune.Client``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from preftune.core import api
from preftune.core.files import TEMPORARY_PREFIX
from preftune.sdk import calls
from preftune.sdk.calls import at
from preftune.sdk.errors import ConnectionFailed, JobFailed
from preftune.sdk.reading import CHUNK, EventLines, size_of

if TYPE_CHECKING:
    from preftune.sdk.client import Client

Told = Callable[[int, int], None]


class _Part:
    def __init__(self, client: Client) -> None:
        self._client = client


class Files(_Part):
    """Uploaded files."""

    def upload(
        self, path: str | PathLike[str], *, purpose: str = "fine-tune", filename: str | None = None, progress: Told | None = None
    ) -> api.File:
        """Upload a file, streamed. progress: is told (bytes sent, bytes in all); a try that broke begins again at 0.

        Raises
            InputError: no such file.
        """
        from preftune.sdk.client import chunks_of

        place = Path(path)
        size = size_of(place)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        params = {"filename": filename or place.name, "purpose": purpose}
        call = calls.Call("POST", at("files"), api.File, params, headers=headers)
        return self._client.send(call, lambda: chunks_of(place, size, progress, CHUNK))

    def list(self, *, purpose: str | None = None, status: str | None = None, limit: int = 100) -> Iterator[api.File]:
        """Files, newest first. limit: how many are fetched at once."""
        return self._client.every(calls.page(at("files"), api.File, purpose=purpose, status=status, limit=limit))

    def get(self, file_id: str) -> api.File:
        """One file."""
        return self._client.send(calls.get(at("files", file_id), api.File))

    def report(self, file_id: str) -> api.FileReport:
        """What validation found."""
        return self._client.send(calls.get(at("files", file_id, "report"), api.FileReport))

    def content(self, file_id: str) -> Iterator[bytes]:
        """The bytes, in chunks."""
        with self._client.stream(calls.get(at("files", file_id, "content"), bytes)) as answer:
            yield from answer.iter_bytes()

    def delete(self, file_id: str) -> api.Deleted:
        """Delete a file."""
        return self._client.send(calls.delete(at("files", file_id), api.Deleted))


class Jobs(_Part):
    """Jobs: training of any method, and evaluations."""

    def create(
        self, recipe: Mapping[str, Any] | None = None, *, model: str | None = None, files: str | Sequence[str] | None = None,
        idempotency_key: str | None = None, **fields: Any,
    ) -> api.JobDetail:  # fmt: skip
        """Create a training job: a recipe with ids of files in the place of paths, or simple fields.

        Parameters
            fields: ``method``, ``validation``, ``from_checkpoint``, ``seed``, ``suffix``, ``metadata``, ``priority``, ``loss``;
                any other is a key of the recipe's stage or an option of the loss (``beta=0.1, epochs=2, adapter="full"``).
            idempotency_key: the same key makes no second job; a fresh one is sent by default, so a retry makes none either.
        """
        given = calls.job_fields(recipe, model, files, fields)
        return self._client.send(calls.create_job(given, idempotency_key))

    def list(
        self, *, status: str | Sequence[str] | None = None, work: str | None = None, name: str | None = None,
        metadata: Mapping[str, str] | None = None, limit: int = 100,
    ) -> Iterator[api.Job]:  # fmt: skip
        """Jobs, newest first. limit: how many are fetched at once."""
        labels = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._client.every(calls.page(at("jobs"), api.Job, status=status, work=work, name=name, limit=limit, **labels))

    def get(self, job_id: str) -> api.JobDetail:
        """One job."""
        return self._client.send(calls.get(at("jobs", job_id), api.JobDetail))

    def cancel(self, job_id: str) -> api.JobDetail:
        """Cancel a job; a running one checkpoints first."""
        return self._client.send(calls.post(at("jobs", job_id, "cancel"), api.JobDetail))

    def pause(self, job_id: str) -> api.JobDetail:
        """Pause a job; a running one checkpoints first."""
        return self._client.send(calls.post(at("jobs", job_id, "pause"), api.JobDetail))

    def resume(self, job_id: str) -> api.JobDetail:
        """Let a paused job go on."""
        return self._client.send(calls.post(at("jobs", job_id, "resume"), api.JobDetail))

    def retry(self, job_id: str, reason: str) -> api.JobDetail:
        """Queue a failed or cancelled job again."""
        return self._client.send(calls.post(at("jobs", job_id, "retry"), api.JobDetail, {"reason": reason}))

    def set_priority(self, job_id: str, priority: int) -> api.JobDetail:
        """Let a waiting job go before others, or behind them."""
        return self._client.send(calls.post(at("jobs", job_id, "priority"), api.JobDetail, {"priority": priority}))

    def delete(self, job_id: str) -> api.Deleted:
        """Take an ended job out of every list."""
        return self._client.send(calls.delete(at("jobs", job_id), api.Deleted))

    def metrics(self, job_id: str, *, limit: int = 1000) -> Iterator[api.Metrics]:
        """Numbers of steps, of held-out evaluations and of the probe, oldest first."""
        return self._client.every(calls.page(at("jobs", job_id, "metrics"), api.Metrics, order="asc", limit=limit))

    def logs(self, job_id: str) -> Iterator[str]:
        """What the job's process printed, in parts."""
        after = 0
        while True:
            part = self._client.send(calls.get(at("jobs", job_id, "logs"), api.JobLog, after=after))
            if part.text:
                yield part.text
            if not part.has_more:
                return
            after = part.next

    def events(
        self,
        job_id: str,
        *,
        follow: bool = True,
        type: str | None = None,  # noqa: A002 -- the route's word
        after: str | None = None,
    ) -> Iterator[api.Event]:
        """Events, oldest first; with ``follow`` until the job has ended, over broken connections."""
        if not follow:
            path = at("jobs", job_id, "events")
            yield from self._client.every(calls.page(path, api.Event, order="asc", type=type, after=after, limit=1000))
            return
        lines, broken = EventLines(), 0
        lines.last = after or ""
        while True:
            call = calls.get(at("jobs", job_id, "stream"), bytes, type=type, after=lines.last or None)
            try:
                with self._client.stream(call) as answer:
                    for line in answer.iter_lines():
                        event = lines.take(line)
                        if event is not None:
                            broken = 0
                            yield event
            except httpx2.TransportError as error:
                broken += 1
                wait = self._client.retries.wait(broken)
                if wait is None:
                    raise ConnectionFailed(f"{self._client.place.url}: the stream broke: {error}") from None
                time.sleep(wait)
                continue
            if lines.end:
                return

    def wait(self, job_id: str, *, on_event: Callable[[api.Event], None] | None = None, check: bool = True) -> api.JobDetail:
        """The job when it has ended. on_event: is told what happens meanwhile.

        Raises
            JobFailed: it did not succeed, unless ``check`` is off.
        """
        for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
        job = self.get(job_id)
        if check and job.status != "succeeded":
            raise JobFailed(job)
        return job


class Models(_Part):
    """Models that jobs made, and the base models that they start from."""

    def list(
        self, *, form: str | None = None, job: str | None = None, name: str | None = None, limit: int = 100
    ) -> Iterator[api.Model]:
        """Models that were made in the project, newest first."""
        return self._client.every(calls.page(at("models"), api.Model, form=form, job=job, name=name, limit=limit))

    def base(self) -> Iterator[api.Model]:
        """Models that jobs may start from."""
        return self._client.every(calls.page(at("models", "base"), api.Model))

    def get(self, name: str) -> api.Model:
        """The newest version of a name, or the version of an id."""
        return self._client.send(calls.get(at("models", name), api.Model))

    def versions(self, name: str) -> Iterator[api.Model]:
        """Every version of a name."""
        return self._client.every(calls.page(at("models", name, "versions"), api.Model))

    def lineage(self, name: str) -> api.Lineage:
        """Where a model comes from."""
        return self._client.send(calls.get(at("models", name, "lineage"), api.Lineage))

    def delete(self, name: str) -> api.Deleted:
        """Delete a version."""
        return self._client.send(calls.delete(at("models", name), api.Deleted))

    def download(
        self, name: str, to: str | PathLike[str], *, form: api.WeightsForm = "merged", progress: Told | None = None
    ) -> Path:
        """Fetch the weights as one .tar.gz; a broken connection goes on where it broke. ``to`` is whole or not there."""
        target = Path(to)
        part = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        path, done, broken = at("models", name, "download"), 0, 0
        with part.open("wb") as file:
            while True:
                headers = {"Range": f"bytes={done}-"} if done else {}
                call = calls.Call("GET", path, bytes, {"form": form}, headers=headers)
                try:
                    with self._client.stream(call) as answer:
                        if done and answer.status_code != 206:
                            done = file.seek(0)
                            file.truncate()
                        total = done + int(answer.headers.get("content-length", 0))
                        for chunk in answer.iter_raw():
                            file.write(chunk)
                            done += len(chunk)
                            if progress is not None:
                                progress(done, total)
                    break
                except httpx2.TransportError as error:
                    broken += 1
                    wait = self._client.retries.wait(broken)
                    if wait is None:
                        raise ConnectionFailed(f"{self._client.place.url}: the download broke: {error}") from None
                    time.sleep(wait)
        return part.replace(target)


class Aliases(_Part):
    """Movable names of models."""

    def list(self) -> Iterator[api.Alias]:
        """Aliases of the project."""
        return self._client.every(calls.page(at("aliases"), api.Alias))

    def get(self, name: str) -> api.Alias:
        """Where an alias points."""
        return self._client.send(calls.get(at("aliases", name), api.Alias))

    def set(self, name: str, model: str, *, reason: str = "") -> api.Alias:
        """Point an alias to a model."""
        return self._client.send(calls.put(at("aliases", name), api.Alias, {"model": model, "reason": reason}))

    def delete(self, name: str) -> api.Deleted:
        """Let an alias point nowhere."""
        return self._client.send(calls.delete(at("aliases", name), api.Deleted))

    def history(self, name: str) -> Iterator[api.Event]:
        """Where an alias pointed, newest first."""
        return self._client.every(calls.page(at("aliases", name, "history"), api.Event))


class Webhooks(_Part):
    """Addresses that are told when jobs end."""

    def list(self) -> Iterator[api.Webhook]:
        """Webhooks of the project."""
        return self._client.every(calls.page(at("webhooks"), api.Webhook))

    def add(self, url: str, *, events: Sequence[str] = (), name: str = "") -> api.WebhookMade:
        """Add a webhook; its secret is shown once."""
        return self._client.send(calls.post(at("webhooks"), api.WebhookMade, {"url": url, "events": [*events], "name": name}))

    def remove(self, webhook_id: str) -> api.Deleted:
        """Take a webhook away."""
        return self._client.send(calls.delete(at("webhooks", webhook_id), api.Deleted))


class Access(_Part):
    """Keys, projects, the audit log, health."""

    def me(self) -> api.Me:
        """Who asks."""
        return self._client.send(calls.get(at("me"), api.Me))

    def health(self) -> api.Health:
        """Whether the server works, and what waits."""
        return self._client.send(calls.get(at("health"), api.Health))

    def keys(self) -> Iterator[api.Key]:
        """Keys of the project."""
        return self._client.every(calls.page(at("keys"), api.Key))

    def add_key(self, name: str, role: api.Role = "developer", *, project: str | None = None) -> api.KeyMade:
        """Make a key; its value is shown once."""
        body = {"name": name, "role": role} | ({"project": project} if project else {})
        return self._client.send(calls.post(at("keys"), api.KeyMade, body))

    def revoke_key(self, key_id: str) -> api.Key:
        """Revoke a key."""
        return self._client.send(calls.delete(at("keys", key_id), api.Key))

    def projects(self) -> Iterator[api.Project]:
        """The caller's project; all of them for an operator."""
        return self._client.every(calls.page(at("projects"), api.Project))

    def add_project(self, name: str, description: str = "") -> api.Project:
        """Make a project."""
        return self._client.send(calls.post(at("projects"), api.Project, {"name": name, "description": description}))

    def audit(self) -> Iterator[api.AuditEntry]:
        """Who did what, newest first."""
        return self._client.every(calls.page(at("audit"), api.AuditEntry))
