"""OpenAI's uploads in parts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from preftune.app.jobs import uploads
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import platform_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.uploads import chunks_of, form_of
from preftune.server.views import file_object, seconds
from preftune.store.records import File, Upload, new_id, now

router = APIRouter(prefix="/v1/uploads")


class NewUpload(BaseModel):
    """A file that comes in parts."""

    filename: str
    bytes: Annotated[int, Field(ge=1)]
    purpose: Annotated[str, Field(pattern=r"^[a-z][a-z_-]{0,63}$")]
    mime_type: str = ""


class Complete(BaseModel):
    """The parts of a file, in their order."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: str | None = None


@router.post("")
def create(request: Request, caller: CallerOf, body: NewUpload) -> dict[str, Any]:
    """Begin an upload."""
    caller.must_be("developer")
    if body.bytes > request.app.state.settings.max_upload:
        raise ApiError(413, f"the file is larger than the {request.app.state.settings.max_upload:,} bytes that are allowed here")
    upload = uploads.begin(platform_of(request), caller.project, body.filename, body.purpose, body.bytes)
    return _object(upload, None)


@router.post("/{upload_id}/parts")
async def add_part(request: Request, caller: CallerOf, upload_id: str) -> dict[str, Any]:
    """Add a part; parts may come in any order."""
    caller.must_be("developer")
    async with form_of(request) as form:
        data = form.get("data")
        if not isinstance(data, UploadFile):
            raise ApiError(400, "data is missing; send the bytes as a part of the form", param="data")
        part = await run_in_threadpool(_keep, request, caller, upload_id, data)
    return {"id": part, "object": "upload.part", "created_at": seconds(now()), "upload_id": upload_id}


def _keep(request: Request, caller: Caller, upload_id: str, data: UploadFile) -> str:
    upload = _upload(request, caller, upload_id)
    return uploads.add_part(platform_of(request), upload, new_id("part_"), chunks_of(data))[1]


@router.post("/{upload_id}/complete")
def complete(request: Request, caller: CallerOf, upload_id: str, body: Complete) -> dict[str, Any]:
    """Join the parts to a file."""
    caller.must_be("developer")
    upload = _upload(request, caller, upload_id)
    upload, file = uploads.complete(platform_of(request), upload, body.part_ids, md5=body.md5)
    audit(platform_of(request), caller, "file.create", file.id, filename=file.filename, bytes=file.bytes)
    return _object(upload, file)


@router.post("/{upload_id}/cancel")
def cancel(request: Request, caller: CallerOf, upload_id: str) -> dict[str, Any]:
    """Give an upload up."""
    caller.must_be("developer")
    return _object(uploads.cancel(platform_of(request), _upload(request, caller, upload_id)), None)


def _upload(request: Request, caller: Caller, upload_id: str) -> Upload:
    upload = platform_of(request).store.get(Upload, upload_id, caller.project)
    if upload is None:
        raise not_found("upload", upload_id)
    return upload


def _object(upload: Upload, file: File | None) -> dict[str, Any]:
    is_over = upload.status == "pending" and upload.expires_at is not None and upload.expires_at < now()
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": seconds(upload.created_at),
        "expires_at": seconds(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": "expired" if is_over else upload.status,
        "file": None if file is None else file_object(file),
    }
