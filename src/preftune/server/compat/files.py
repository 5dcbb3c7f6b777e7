"""``/v1/files``, which OpenAI's and Together's clients share: one object that both accept, and two ways to upload."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from preftune.app.jobs import files, uploads
from preftune.app.jobs.platform import Platform
from preftune.server.addresses import upload_url
from preftune.server.errors import envelope
from preftune.server.lookup import every, file_of, platform_of
from preftune.server.ranges import content_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.uploads import form_of, keep, text_of
from preftune.server.views import cursor_page, file_object, whole_list
from preftune.store.base import Query as Asked
from preftune.store.records import File

router = APIRouter(prefix="/v1")


@router.get("/files")
def list_files(
    request: Request, caller: CallerOf, after: str | None = None, limit: Annotated[int, Query(ge=1, le=10_000)] | None = None,
    order: Literal["asc", "desc"] = "desc", purpose: str | None = None,
) -> Response:  # fmt: skip
    """Files of the project; all of them where no limit is given, as Together's clients take them."""
    where = {} if purpose is None else {"purpose": purpose}
    store, is_newest_first = platform_of(request).store, order == "desc"
    if limit is not None:
        return JSONResponse(
            cursor_page(store.page(File, Asked(caller.project, where, after, limit, is_newest_first)), file_object)
        )
    found = every(platform_of(request), File, caller.project, where, is_newest_first=is_newest_first, after=after)
    return whole_list((file_object(file) for file in found), has_cursor=True)


@router.post("/files")
async def create_file(request: Request, caller: CallerOf) -> Response:
    """Upload a file with its bytes (OpenAI), or announce one and be sent to where the bytes go (Together)."""
    caller.must_be("developer")
    async with form_of(request) as form:
        part = form.get("file")
        if isinstance(part, UploadFile):
            return JSONResponse(file_object(await keep(platform_of(request), caller, part, text_of(form, "purpose"))))
        announced = _announce(platform_of(request), caller, form)
    if isinstance(announced, Response):
        return announced
    headers = {"Location": upload_url(request, announced.id), "X-Together-File-Id": announced.id}
    return Response(status_code=302, headers=headers)


def _announce(platform: Platform, caller: Caller, form: FormData) -> File | Response:
    name, purpose = text_of(form, "file_name"), text_of(form, "purpose")
    checksum = form.get("checksum")
    return announce(platform, caller, name, purpose, checksum if isinstance(checksum, str) else "")


def announce(platform: Platform, caller: Caller, name: str, purpose: str, checksum: str) -> File | Response:
    """A file whose bytes are to come; 409 with the id of the project's own file that has them already."""
    same = uploads.same_file(platform, caller.project, purpose, checksum)
    if same is not None:
        body = {"file_id": same.id, **envelope(409, f"file {same.id!r} has these bytes already", code="file_exists")}
        return JSONResponse(body, 409, headers={"x-should-retry": "false"})
    file = uploads.announce(platform, caller.project, name, purpose, checksum)
    audit(platform, caller, "file.announce", file.id, filename=file.filename)
    return file


@router.get("/files/{file_id}")
def get_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """One file."""
    return file_object(file_of(request, caller, file_id))


@router.get("/files/{file_id}/content")
def file_content(request: Request, caller: CallerOf, file_id: str) -> Response:
    """The bytes of a file."""
    return content_of(request, file_of(request, caller, file_id).artifact, "application/octet-stream")


@router.delete("/files/{file_id}")
def delete_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """Delete a file."""
    caller.must_be("developer")
    file = file_of(request, caller, file_id)
    files.delete(platform_of(request), file)
    audit(platform_of(request), caller, "file.delete", file_id)
    return {"id": file_id, "object": "file", "deleted": True}
