"""A multipart body to a file of the platform: streamed to disk, hashed on the way."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

import anyio
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from preftune.app.jobs.files import receive
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError
from preftune.server.security import Caller, audit
from preftune.store.records import File

T = TypeVar("T")
CHUNK = 1 << 20
STREAMS = 64  # bodies that are written at once; others wait, and no other route does
SILENCE_SECONDS = 60.0


@contextlib.asynccontextmanager
async def form_of(request: Request) -> AsyncIterator[FormData]:
    """The parts of a multipart body; files are on disk by now, and gone when the block ends."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        raise ApiError(400, f"send multipart/form-data, not {kind.partition(';')[0] or 'a body without content type'}")
    async with request.form(max_files=100, max_fields=50) as form:
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
        ApiError: 408, the sender is silent for SILENCE_SECONDS; 400, it hung up.
    """
    is_done = False

    async def take() -> bytes:
        nonlocal is_done
        with _timely():
            message = await request.receive()
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


@contextlib.contextmanager
def _timely() -> Iterator[None]:
    try:
        with anyio.fail_after(SILENCE_SECONDS):
            yield
    except TimeoutError:
        raise ApiError(408, f"nothing was sent for {SILENCE_SECONDS:.0f} s; send the upload again") from None
