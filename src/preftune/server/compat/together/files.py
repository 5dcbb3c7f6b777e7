"""Together's own routes of ``/v1/files``: validation, and uploads in parts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from preftune.app.jobs import uploads
from preftune.server.addresses import upload_url
from preftune.server.compat.files import announce
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import file_of, platform_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import file_object
from preftune.store.records import Upload

router = APIRouter(prefix="/v1/files")
MAX_PARTS = 10_000


class Initiate(BaseModel):
    """A file that comes in parts."""

    file_name: str
    file_size: Annotated[int, Field(ge=1)]
    num_parts: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    purpose: Annotated[str, Field(pattern=r"^[a-z][a-z_-]{0,63}$")]
    checksum: str = ""


class Part(BaseModel):
    """A part that has arrived, by its number and ETag."""

    part_number: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    etag: str


class Complete(BaseModel):
    """The parts of a file, all of them."""

    upload_id: str
    file_id: str
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]


class Abort(BaseModel):
    """An upload that is given up."""

    upload_id: str
    file_id: str


@router.post("/{file_id}/preprocess")
def preprocess(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """The file, whose validation was queued when its bytes had come."""
    return file_object(file_of(request, caller, file_id))


@router.post("/multipart/initiate", response_model=None)
def initiate(request: Request, caller: CallerOf, body: Initiate) -> dict[str, Any] | Response:
    """Begin an upload in parts: a signed URL for each; 409 where the project has the same file."""
    caller.must_be("developer")
    if body.file_size > request.app.state.settings.max_upload:
        raise ApiError(413, f"the file is larger than the {request.app.state.settings.max_upload:,} bytes that are allowed here")
    file = announce(platform_of(request), caller, body.file_name, body.purpose, body.checksum)
    if isinstance(file, Response):
        return file
    upload = uploads.begin(
        platform_of(request), caller.project, body.file_name, body.purpose, body.file_size, sha256=body.checksum, file=file.id
    )
    parts = [
        {"PartNumber": number, "URL": upload_url(request, f"{upload.id}/{number}"), "Headers": {}}
        for number in range(1, body.num_parts + 1)
    ]
    return {"upload_id": upload.id, "file_id": file.id, "parts": parts}


@router.post("/multipart/complete")
def complete(request: Request, caller: CallerOf, body: Complete) -> dict[str, Any]:
    """Join the parts."""
    caller.must_be("developer")
    upload = _upload(request, caller, body.upload_id, body.file_id)
    numbers = [one.part_number for one in sorted(body.parts, key=lambda one: one.part_number)]
    for one in body.parts:
        kept = upload.parts.get(str(one.part_number))
        if kept is not None and kept["etag"] != one.etag.strip('"'):
            raise ApiError(400, f"part {one.part_number} came with another ETag; send it again", param="parts")
    _, file = uploads.complete(platform_of(request), upload, [str(number) for number in numbers])
    audit(platform_of(request), caller, "file.create", file.id, filename=file.filename, bytes=file.bytes)
    return {"file": file_object(file)}


@router.post("/multipart/abort")
def abort(request: Request, caller: CallerOf, body: Abort) -> dict[str, Any]:
    """Give an upload up."""
    caller.must_be("developer")
    upload = uploads.cancel(platform_of(request), _upload(request, caller, body.upload_id, body.file_id))
    return {"upload_id": upload.id, "file_id": upload.file, "status": upload.status}


def _upload(request: Request, caller: Caller, upload_id: str, file_id: str) -> Upload:
    upload = platform_of(request).store.get(Upload, upload_id, caller.project)
    if upload is None or upload.file != file_id:
        raise not_found("upload", upload_id)
    return upload
