"""A multipart body to a file of the platform: streamed to disk, hashed on the way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message, Receive

from preftune.app.jobs.files import receive
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError
from preftune.server.security import Caller, audit
from preftune.store.records import File

T = TypeVar("T")
CHUNK = 1 << 20
STREAMS = 64  # bodies that are written at once; others wait, and no other route does
SILENCE_SECONDS = 60.0
LEAST_BYTES = 16 << 10  # in that time: a twentieth of what a telephone line's modem did


@contextlib.asynccontextmanager
async def form_of(request: Request) -> AsyncIterator[FormData]:
    """The parts of a multipart body; files are on disk by now, and gone when the block ends."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        raise ApiError(400, f"send multipart/form-data, not {kind.partition(';')[0] or 'a body without content type'}")
    paced = Request(request.scope, _Paced(request.receive).take)
    async with paced.form(max_files=100, max_fields=50) as form:
        yield form


def text_of(form: FormData, name: str, default: str | None = None) -> str:
    """A text field of a form; 400 where it is missing and has no default."""
    value = form.get(name, default)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} is missing; send it as a form field", param=name, code="missing_required_parameter")
    return value


async def keep(platform: Platform, caller: Caller, part: UploadFile, purpose: str, filename: str | None = None) -> File:
    """Keep one uploaded part as a file and queue its validation."""
    name = filename or part.filename or "upload.jsonl"

    def store() -> File:
        kept = receive(platform, caller.project, name, purpose, chunks_of(part))
        audit(platform, caller, "file.create", kept.id, filename=name, bytes=kept.bytes)
        return kept

    return await run_in_threadpool(store)


def chunks_of(part: UploadFile) -> Iterator[bytes]:
    """The bytes of a part from its start."""
    part.file.seek(0)
    while chunk := part.file.read(CHUNK):
        yield chunk


async def with_body(request: Request, work: Callable[[Iterator[bytes]], T]) -> T:
    """The result of ``work`` on the chunks of a raw body, in a thread, while they arrive.

    Raises
        ApiError: 408, the sender sends next to nothing for SILENCE_SECONDS; 400, it hung up.
    """
    is_done, paced = False, _Paced(request.receive)

    async def take() -> bytes:
        nonlocal is_done
        message = await paced.take()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the upload broke off; send it again", code="upload_incomplete")
        is_done = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    def chunks() -> Iterator[bytes]:
        while not is_done:
            if chunk := anyio.from_thread.run(take):
                yield chunk

    state = request.app.state
    if not hasattr(state, "streams"):
        state.streams = anyio.CapacityLimiter(STREAMS)
    return await anyio.to_thread.run_sync(lambda: work(chunks()), limiter=state.streams)


class _Paced:
    """A body that has to come on: for LEAST_BYTES of it the sender may be waited for SILENCE_SECONDS.

    Who sends a byte now and then holds a connection, a thread and a file open for as long as he likes otherwise. Only the
    sender's time counts, not what a slow disk takes.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._seconds, self._missing = SILENCE_SECONDS, LEAST_BYTES

    async def take(self) -> Message:
        """The next piece; ApiError 408 where too little came."""
        began = time.monotonic()
        try:
            with anyio.fail_after(self._seconds):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, f"less than {LEAST_BYTES:,} bytes were sent in {SILENCE_SECONDS:g} s; send the upload again", code="too_slow"
            ) from None
        self._seconds = max(0.0, self._seconds - (time.monotonic() - began))
        self._missing -= len(message.get("body", b""))
        if self._missing <= 0:
            self._seconds, self._missing = SILENCE_SECONDS, LEAST_BYTES
        return message
