"""Files: uploaded, validated, listed, fetched, deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import Response

from preftune.app.jobs import files
from preftune.core import api
from preftune.server.errors import ApiError
from preftune.server.lookup import file_of, platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.ranges import content_of
from preftune.server.security import CallerOf, audit
from preftune.server.uploads import form_of, keep, with_body
from preftune.store.records import File

router = APIRouter(prefix="/api/v1/files", tags=["files"])
Purpose = Annotated[str, Query(max_length=64, pattern=r"^[a-z][a-z0-9-_]*$")]
_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
                }
            },
        },
    }
}


@router.post("", status_code=201, openapi_extra=_UPLOAD)
async def upload(
    request: Request, caller: CallerOf, filename: Annotated[str | None, Query(max_length=255)] = None,
    purpose: Purpose = "fine-tune",
) -> api.File:  # fmt: skip
    """Upload a file: its bytes as the body with ``filename`` in the query, or a multipart form with a part ``file``.

    It is hashed while it arrives and validated before a job uses it; ``report`` says what was found.
    """
    caller.must_be("developer")
    platform = platform_of(request)
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with form_of(request) as form:
            part, said = form.get("file"), form.get("purpose")
            if not isinstance(part, UploadFile):
                raise ApiError(400, "file is missing; send the bytes as a part named file", param="file")
            what = said if isinstance(said, str) and said else purpose
            return shown.file(await keep(platform, caller, part, what, filename))
    if not filename:
        raise ApiError(400, "filename is missing; send ?filename=NAME.jsonl with the bytes as the body", param="filename")

    def work(chunks: Any) -> File:
        kept = files.receive(platform, caller.project, filename, purpose, chunks, max_bytes=request.app.state.settings.max_upload)
        audit(platform, caller, "file.create", kept.id, filename=kept.filename, bytes=kept.bytes)
        return kept

    return shown.file(await with_body(request, work))


@router.get("")
def list_files(
    request: Request, caller: CallerOf, asked: PartOf, purpose: Purpose | None = None, status: api.FileStatus | None = None,
    sha256: Annotated[str | None, Query(max_length=64)] = None,
) -> api.Page[api.File]:  # fmt: skip
    """Files of the project."""
    where = {"purpose": purpose, "status": status, "sha256": sha256}
    return page_of(platform_of(request), File, asked, caller.project, shown.file, where=where)


@router.get("/{file_id}")
def get_file(request: Request, caller: CallerOf, file_id: str) -> api.File:
    """One file."""
    return shown.file(file_of(request, caller, file_id))


@router.get("/{file_id}/report")
def file_report(request: Request, caller: CallerOf, file_id: str) -> api.FileReport:
    """What validation found: rows, what they hold, and the first bad ones."""
    return shown.report(file_of(request, caller, file_id))


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}}, 206: {"content": {"application/octet-stream": {}}},
        416: {"description": "The range lies outside of the bytes.", "model": api.ErrorBody},
    },
)  # fmt: skip
def file_content(request: Request, caller: CallerOf, file_id: str) -> Response:
    """The bytes of a file, or a range of them."""
    return content_of(request, file_of(request, caller, file_id).artifact, "application/octet-stream")


@router.delete("/{file_id}")
def delete_file(request: Request, caller: CallerOf, file_id: str) -> api.Deleted:
    """Delete a file; models that were made of it stay."""
    caller.must_be("developer")
    files.delete(platform_of(request), file_of(request, caller, file_id))
    audit(platform_of(request), caller, "file.delete", file_id)
    return api.Deleted(id=file_id)
