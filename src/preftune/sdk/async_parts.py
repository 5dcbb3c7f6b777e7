"""The nouns of ``preftune.AsyncClient``: those of ``parts``, awaited (a test holds the two together)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from os import PathLike
from pathlib import Path
from typing import Any

import httpx2

from preftune.core import api
from preftune.core.files import TEMPORARY_PREFIX
from preftune.core.served import FeedbackKind
from preftune.sdk import calls, nouns
from preftune.sdk.calls import at
from preftune.sdk.errors import ConnectionFailed, JobFailed, WaitTimedOut
from preftune.sdk.methods import AsyncPart
from preftune.sdk.reading import CHUNK, EventLines, size_of

Told = Callable[[int, int], None]


class Files(nouns.Files, AsyncPart):
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

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """The bytes, in chunks."""
        async with self._client.stream(calls.get(at("files", file_id, "content"), bytes)) as answer:
            async for chunk in answer.aiter_bytes():
                yield chunk

    async def wait(self, file_id: str, *, timeout: float | None = None) -> api.File:
        """The file when it is validated; ``status`` says whether a job can use it. timeout: seconds, without an end by default.

        Raises
            WaitTimedOut: it is not validated in time, for instance because the server has no worker.
        """
        begun, pause = asyncio.get_running_loop().time(), 0.1
        while True:
            file = await self.get(file_id)
            if file.status in {"processed", "error"}:
                return file
            if timeout is not None and asyncio.get_running_loop().time() - begun >= timeout:
                raise WaitTimedOut(
                    f"file {file_id} is not validated after {timeout:g} s ({file.status}); a worker of the server does it: "
                    f"files.wait({file_id!r}) waits again"
                )
            await asyncio.sleep(pause)
            pause = min(2.0, 1.5 * pause)


class Jobs(nouns.Jobs, AsyncPart):
    """Jobs: training of any method, and evaluations."""

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
        async for event in self._follow(job_id, type, after or "", math.inf):
            yield event

    async def wait(
        self, job_id: str, *, timeout: float | None = None, on_event: Callable[[api.Event], None] | None = None,
        check: bool = True,
    ) -> api.JobDetail:  # fmt: skip
        """The job when it has ended. timeout: seconds, without an end by default. on_event: is told what happens meanwhile.

        Raises
            WaitTimedOut: it has not ended in time (give or take some seconds); it goes on.
            JobFailed: it did not succeed, unless ``check`` is off.
        """
        end = math.inf if timeout is None else asyncio.get_running_loop().time() + timeout
        async for event in self._follow(job_id, None, "", end):
            if on_event is not None:
                on_event(event)
        job = await self.get(job_id)
        if timeout is not None and not job.is_ended:
            raise WaitTimedOut(calls.still_running(job, timeout), job)
        if check and job.status != "succeeded":
            raise JobFailed(job)
        return job

    async def _follow(self, job_id: str, type: str | None, after: str, end: float) -> AsyncIterator[api.Event]:  # noqa: A002 -- the route's word
        """Events until the job, or the time, has ended; a broken stream goes on behind the last event."""
        lines, broken = EventLines(), 0
        lines.last = after
        while not lines.end and (left := end - asyncio.get_running_loop().time()) > 0:
            call = calls.stream_of(job_id, type, lines.last, left)
            try:
                async with self._client.stream(call) as answer:
                    async for line in answer.aiter_lines():
                        event = lines.take(line)
                        if event is not None:
                            broken = 0
                            yield event
                        if asyncio.get_running_loop().time() > end:
                            return
            except httpx2.TransportError as error:
                if isinstance(error, httpx2.ReadTimeout) and call.read_seconds is not None:
                    continue
                broken += 1
                wait = self._client.retries.wait(broken)
                if wait is None:
                    raise ConnectionFailed(f"{self._client.place.url}: the stream broke: {error}") from None
                await asyncio.sleep(wait)


class Models(nouns.Models, AsyncPart):
    """Models that jobs made, and the base models that they start from."""

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


class Aliases(nouns.Aliases, AsyncPart):
    """Movable names of models."""


class Evaluations(nouns.Evaluations, AsyncPart):
    """Answers judged by a model, as jobs; ``nouns.Evaluations`` says what a side is."""

    async def rows(self, evaluation_id: str) -> AsyncIterator[dict[str, Any]]:
        """Every judged row of an evaluation that has succeeded."""
        call = calls.rows_of(await self._client.jobs.get(evaluation_id))
        async with self._client.stream(call) as answer:
            async for line in answer.aiter_lines():
                yield json.loads(line)


class Feedback(nouns.Feedback, AsyncPart):
    """What people say of completions that were kept."""

    async def rows(self, kind: FeedbackKind = "preferences") -> AsyncIterator[dict[str, Any]]:
        """Feedback as rows that ``files.upload`` and a job take: pairs and edits, or labelled answers (``ratings``)."""
        async with self._client.stream(calls.get(at("feedback", "export"), bytes, kind=kind)) as answer:
            async for line in answer.aiter_lines():
                yield json.loads(line)


class Splits(nouns.Splits, AsyncPart):
    """Traffic of a name split between two models, with the live result."""


class Serving(nouns.Serving, AsyncPart):
    """What is in memory to be asked (admin)."""


class Webhooks(nouns.Webhooks, AsyncPart):
    """Addresses that are told when jobs end."""


class Keys(nouns.Keys, AsyncPart):
    """API keys (admin)."""


class Access(nouns.Access, AsyncPart):
    """Who asks, projects, the audit log, health."""
