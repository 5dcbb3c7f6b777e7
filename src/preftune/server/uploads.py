"""A multipart body to a file of the platform: streamed to disk, hashed on the way."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from preftune.app.jobs.files import receive
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError
from preftune.server.security import Caller, audit
from preftune.store.records import File

CHUNK = 1 << 20


async def form_of(request: Request) -> FormData:
    """The parts of a multipart body; files are on disk by now."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith(("multipart/form-data", "application/x-www-form-urlencoded")):
        raise ApiError(400, f"send multipart/form-data, not {kind.partition(';')[0] or 'a body without content type'}")
    return await request.form(max_files=100, max_fields=50)


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
        kept = receive(platform, caller.project, name, purpose, _chunks(part))
        audit(platform, caller, "file.create", kept.id, filename=name, bytes=kept.bytes)
        return kept

    return await run_in_threadpool(store)


def _chunks(part: UploadFile) -> Iterator[bytes]:
    part.file.seek(0)
    while chunk := part.file.read(CHUNK):
        yield chunk
