"""The nouns of ``preftune.AsyncClient``: those of ``parts``, awaited (a test holds the two together)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
    from preftune.sdk.async_client import AsyncClient

Told = Callable[[int, int], None]


class _Part:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client


class Files(_Part):
    """Uploaded files."""

    async def upload(
        self, path: str | PathLike[str], *, purpose: str = "fine-tune", filename: str | None = None, progress: Told | None = None
    ) -> api.File:
        """Upload a file, streamed. progress: is told (bytes sent, bytes in all); a try that broke begins again at 0.

        Raises
            InputError: no such file.
        """
        from preftune.sdk.async_client import chunks_of

        place = Path(path)
        size = size_of(place)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        params = {"filename": filename or place.name, "purpose": purpose}
        call = calls.Call("POST", at("files"), api.File, params, headers=headers)
        return await self._client.send(call, lambda: chunks_of(place, size, progress, CHUNK))

    def list(self, *, purpose: str | None = None, status: str | None = None, limit: int = 100) -> AsyncIterator[api.File]:
        """Files, newest first. limit: how many are fetched at once."""
        return self._client.every(calls.page(at("files"), api.File, purpose=purpose, status=status, limit=limit))

    async def get(self, file_id: str) -> api.File:
        """One file."""
        return await self._client.send(calls.get(at("files", file_id), api.File))

    async def report(self, file_id: str) -> api.FileReport:
        """What validation found."""
        return await self._client.send(calls.get(at("files", file_id, "report"), api.FileReport))

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """The bytes, in chunks."""
        async with self._client.stream(calls.get(at("files", file_id, "content"), bytes)) as answer:
            async for chunk in answer.aiter_bytes():
                yield chunk

    async def delete(self, file_id: str) -> api.Deleted:
        """Delete a file."""
        return await self._client.send(calls.delete(at("files", file_id), api.Deleted))


class Jobs(_Part):
    """Jobs: training of any method, and evaluations."""

    async def create(
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
        return await self._client.send(calls.create_job(given, idempotency_key))

    def list(
        self, *, status: str | Sequence[str] | None = None, work: str | None = None, name: str | None = None,
        metadata: Mapping[str, str] | None = None, limit: int = 100,
    ) -> AsyncIterator[api.Job]:  # fmt: skip
        """Jobs, newest first. limit: how many are fetched at once."""
        labels = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return self._client.every(calls.page(at("jobs"), api.Job, status=status, work=work, name=name, limit=limit, **labels))

    async def get(self, job_id: str) -> api.JobDetail:
        """One job."""
        return await self._client.send(calls.get(at("jobs", job_id), api.JobDetail))

    async def cancel(self, job_id: str) -> api.JobDetail:
        """Cancel a job; a running one checkpoints first."""
        return await self._client.send(calls.post(at("jobs", job_id, "cancel"), api.JobDetail))

    async def pause(self, job_id: str) -> api.JobDetail:
        """Pause a job; a running one checkpoints first."""
        return await self._client.send(calls.post(at("jobs", job_id, "pause"), api.JobDetail))

    async def resume(self, job_id: str) -> api.JobDetail:
        """Let a paused job go on."""
        return await self._client.send(calls.post(at("jobs", job_id, "resume"), api.JobDetail))

    async def retry(self, job_id: str, reason: str) -> api.JobDetail:
        """Queue a failed or cancelled job again."""
        return await self._client.send(calls.post(at("jobs", job_id, "retry"), api.JobDetail, {"reason": reason}))

    async def set_priority(self, job_id: str, priority: int) -> api.JobDetail:
        """Let a waiting job go before others, or behind them."""
        return await self._client.send(calls.post(at("jobs", job_id, "priority"), api.JobDetail, {"priority": priority}))

    async def delete(self, job_id: str) -> api.Deleted:
        """Take an ended job out of every list."""
        return await self._client.send(calls.delete(at("jobs", job_id), api.Deleted))

    def metrics(self, job_id: str, *, limit: int = 1000) -> AsyncIterator[api.Metrics]:
        """Numbers of steps, of held-out evaluations and of the probe, oldest first."""
        return self._client.every(calls.page(at("jobs", job_id, "metrics"), api.Metrics, order="asc", limit=limit))

    async def logs(self, job_id: str) -> AsyncIterator[str]:
        """What the job's process printed, in parts."""
        after = 0
        while True:
            part = await self._client.send(calls.get(at("jobs", job_id, "logs"), api.JobLog, after=after))
            if part.text:
                yield part.text
            if not part.has_more:
                return
            after = part.next

    async def events(
        self,
        job_id: str,
        *,
        follow: bool = True,
        type: str | None = None,  # noqa: A002 -- the route's word
        after: str | None = None,
    ) -> AsyncIterator[api.Event]:
        """Events, oldest first; with ``follow`` until the job has ended, over broken connections."""
        if not follow:
            path = at("jobs", job_id, "events")
            asked = calls.page(path, api.Event, order="asc", type=type, after=after, limit=1000)
            async for one in self._client.every(asked):
                yield one
            return
        lines, broken = EventLines(), 0
        lines.last = after or ""
        while True:
            call = calls.get(at("jobs", job_id, "stream"), bytes, type=type, after=lines.last or None)
            try:
                async with self._client.stream(call) as answer:
                    async for line in answer.aiter_lines():
                        event = lines.take(line)
                        if event is not None:
                            broken = 0
                            yield event
            except httpx2.TransportError as error:
                broken += 1
                wait = self._client.retries.wait(broken)
                if wait is None:
                    raise ConnectionFailed(f"{self._client.place.url}: the stream broke: {error}") from None
                await asyncio.sleep(wait)
                continue
            if lines.end:
                return

    async def wait(
        self, job_id: str, *, on_event: Callable[[api.Event], None] | None = None, check: bool = True
    ) -> api.JobDetail:
        """The job when it has ended. on_event: is told what happens meanwhile.

        Raises
            JobFailed: it did not succeed, unless ``check`` is off.
        """
        async for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
        job = await self.get(job_id)
        if check and job.status != "succeeded":
            raise JobFailed(job)
        return job


class Models(_Part):
    """Models that jobs made, and the base models that they start from."""

    def list(
        self, *, form: str | None = None, job: str | None = None, name: str | None = None, limit: int = 100
    ) -> AsyncIterator[api.Model]:
        """Models that were made in the project, newest first."""
        return self._client.every(calls.page(at("models"), api.Model, form=form, job=job, name=name, limit=limit))

    def base(self) -> AsyncIterator[api.Model]:
        """Models that jobs may start from."""
        return self._client.every(calls.page(at("models", "base"), api.Model))

    async def get(self, name: str) -> api.Model:
        """The newest version of a name, or the version of an id."""
        return await self._client.send(calls.get(at("models", name), api.Model))

    def versions(self, name: str) -> AsyncIterator[api.Model]:
        """Every version of a name."""
        return self._client.every(calls.page(at("models", name, "versions"), api.Model))

    async def lineage(self, name: str) -> api.Lineage:
        """Where a model comes from."""
        return await self._client.send(calls.get(at("models", name, "lineage"), api.Lineage))

    async def delete(self, name: str) -> api.Deleted:
        """Delete a version."""
        return await self._client.send(calls.delete(at("models", name), api.Deleted))

    async def download(
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
                    async with self._client.stream(call) as answer:
                        if done and answer.status_code != 206:
                            done = file.seek(0)
                            file.truncate()
                        total = done + int(answer.headers.get("content-length", 0))
                        async for chunk in answer.aiter_raw():
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
                    await asyncio.sleep(wait)
        return part.replace(target)


class Aliases(_Part):
    """Movable names of models."""

    def list(self) -> AsyncIterator[api.Alias]:
        """Aliases of the project."""
        return self._client.every(calls.page(at("aliases"), api.Alias))

    async def get(self, name: str) -> api.Alias:
        """Where an alias points."""
        return await self._client.send(calls.get(at("aliases", name), api.Alias))

    async def set(self, name: str, model: str, *, reason: str = "") -> api.Alias:
        """Point an alias to a model."""
        return await self._client.send(calls.put(at("aliases", name), api.Alias, {"model": model, "reason": reason}))

    async def delete(self, name: str) -> api.Deleted:
        """Let an alias point nowhere."""
        return await self._client.send(calls.delete(at("aliases", name), api.Deleted))

    def history(self, name: str) -> AsyncIterator[api.Event]:
        """Where an alias pointed, newest first."""
        return self._client.every(calls.page(at("aliases", name, "history"), api.Event))


class Webhooks(_Part):
    """Addresses that are told when jobs end."""

    def list(self) -> AsyncIterator[api.Webhook]:
        """Webhooks of the project."""
        return self._client.every(calls.page(at("webhooks"), api.Webhook))

    async def add(self, url: str, *, events: Sequence[str] = (), name: str = "") -> api.WebhookMade:
        """Add a webhook; its secret is shown once."""
        return await self._client.send(
            calls.post(at("webhooks"), api.WebhookMade, {"url": url, "events": [*events], "name": name})
        )

    async def remove(self, webhook_id: str) -> api.Deleted:
        """Take a webhook away."""
        return await self._client.send(calls.delete(at("webhooks", webhook_id), api.Deleted))


class Access(_Part):
    """Keys, projects, the audit log, health."""

    async def me(self) -> api.Me:
        """Who asks."""
        return await self._client.send(calls.get(at("me"), api.Me))

    async def health(self) -> api.Health:
        """Whether the server works, and what waits."""
        return await self._client.send(calls.get(at("health"), api.Health))

    def keys(self) -> AsyncIterator[api.Key]:
        """Keys of the project."""
        return self._client.every(calls.page(at("keys"), api.Key))

    async def add_key(self, name: str, role: api.Role = "developer", *, project: str | None = None) -> api.KeyMade:
        """Make a key; its value is shown once."""
        body = {"name": name, "role": role} | ({"project": project} if project else {})
        return await self._client.send(calls.post(at("keys"), api.KeyMade, body))

    async def revoke_key(self, key_id: str) -> api.Key:
        """Revoke a key."""
        return await self._client.send(calls.delete(at("keys", key_id), api.Key))

    def projects(self) -> AsyncIterator[api.Project]:
        """The caller's project; all of them for an operator."""
        return self._client.every(calls.page(at("projects"), api.Project))

    async def add_project(self, name: str, description: str = "") -> api.Project:
        """Make a project."""
        return await self._client.send(calls.post(at("projects"), api.Project, {"name": name, "description": description}))

    def audit(self) -> AsyncIterator[api.AuditEntry]:
        """Who did what, newest first."""
        return self._client.every(calls.page(at("audit"), api.AuditEntry))
