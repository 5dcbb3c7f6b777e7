"""SeekrFlow's files: validated while they are uploaded; one with a bad row is refused and not kept."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, Response

from preftune.app.jobs import files
from preftune.app.jobs.checked import DoesNotConform, receive_checked
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError, envelope
from preftune.server.lookup import every, file_of, platform_of
from preftune.server.ranges import content_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.uploads import chunks_of, form_of, text_of
from preftune.server.views import zulu
from preftune.store.records import File

router = APIRouter(prefix="/v1/flow")
PURPOSES = frozenset({"reinforcement-fine-tune", "fine-tune", "preference-fine-tune", "pre-train", "alignment"})
SORTS = {"created_at": "number", "filename": "filename", "size": "bytes", "type": "filename"}


class Rename(BaseModel):
    """A file's new name."""

    new_filename: str


class Metadata(BaseModel):
    """What a file of the purpose ``alignment`` would be."""

    purpose: str
    suffix: str
    size: int


@router.put("/files")
async def upload(request: Request, caller: CallerOf) -> Response:
    """Upload a file; 400 with the first 20 bad rows where it does not conform to its purpose."""
    caller.must_be("developer")
    async with form_of(request) as form:
        part = form.get("files")
        if not isinstance(part, UploadFile):
            raise ApiError(400, "files is missing; send the file as a part of the form", param="files")
        return await _answered(platform_of(request), caller, form, [(part, await _name(form, part))], is_one=True)


@router.put("/bulk_files")
async def bulk_upload(request: Request, caller: CallerOf) -> Response:
    """Upload several files; where one does not conform, none is kept."""
    caller.must_be("developer")
    async with form_of(request) as form:
        parts = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
        if not parts:
            raise ApiError(400, "files is missing; send the files as parts of the form", param="files")
        return await _answered(platform_of(request), caller, form, [(part, part.filename or "") for part in parts], is_one=False)


async def _name(form: FormData, part: UploadFile) -> str:
    """The file's name: the content of a part that is called filename, or that of the file's own part."""
    given = form.get("filename")
    if isinstance(given, UploadFile):
        return (await given.read(1024)).decode("utf-8", "replace").strip()
    return given or part.filename or ""


async def _answered(
    platform: Platform, caller: Caller, form: FormData, parts: list[tuple[UploadFile, str]], *, is_one: bool
) -> Response:
    purpose = text_of(form, "purpose", "fine-tune")

    def keep() -> list[File]:
        kept: list[File] = []
        try:
            for part, name in parts:
                kept.append(receive_checked(platform, caller.project, name, purpose, chunks_of(part)))
        except BaseException:
            for file in kept:
                files.delete(platform, file)
            raise
        for file in kept:
            audit(platform, caller, "file.create", file.id, filename=file.filename, bytes=file.bytes)
        return kept

    try:
        kept = await run_in_threadpool(keep)
    except DoesNotConform as error:
        body = envelope(400, str(error), param="files", code="file_does_not_conform")
        return JSONResponse({**body, "bad_rows": error.rows}, 400)
    return JSONResponse(_object(kept[0]) if is_one else [_object(file) for file in kept])


@router.post("/files/validate_metadata")
def validate_metadata(caller: CallerOf, body: Metadata) -> dict[str, Any]:
    """Documents are not made into data here, so no file of that purpose is valid."""
    del caller
    return {"is_valid": False, "errors": f"purpose {body.purpose!r} is not offered; upload preference or chat rows"}


@router.get("/files")
def list_files(
    request: Request, caller: CallerOf, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    offset: Annotated[int, Query(ge=0)] = 0, sort_by: Literal["created_at", "filename", "type", "size"] = "created_at",
    sort_order: Literal["asc", "desc"] = "desc", purpose: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Files of the project, also those that other clients uploaded."""
    where = {} if purpose is None else {"purpose": purpose}
    if (sort_by, sort_order) == ("created_at", "desc"):  # the store's own order: only what comes before the end is read
        size = min(1000, offset + limit)
        newest = every(platform_of(request), File, caller.project, where, size=size)
        return {"object": "list", "data": [_object(file) for file in islice(newest, offset, offset + limit)]}
    found = list(every(platform_of(request), File, caller.project, where))
    found.sort(key=lambda file: getattr(file, SORTS[sort_by]), reverse=sort_order == "desc")
    return {"object": "list", "data": [_object(file) for file in found[offset : offset + limit]]}


@router.get("/files/{file_id}")
def get_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """One file."""
    return _object(file_of(request, caller, file_id))


@router.delete("/files/{file_id}")
def delete_file(request: Request, caller: CallerOf, file_id: str) -> dict[str, Any]:
    """Delete a file."""
    caller.must_be("developer")
    files.delete(platform_of(request), file_of(request, caller, file_id))
    audit(platform_of(request), caller, "file.delete", file_id)
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/files/{file_id}/content")
def file_content(request: Request, caller: CallerOf, file_id: str) -> Response:
    """The bytes of a file."""
    return content_of(request, file_of(request, caller, file_id).artifact, "application/octet-stream")


@router.put("/files/{file_id}/rename")
def rename(request: Request, caller: CallerOf, file_id: str, body: Rename) -> dict[str, Any]:
    """Give a file another name; its ending stays what its bytes are."""
    caller.must_be("developer")
    file, name = file_of(request, caller, file_id), files.clean_name(body.new_filename)
    if files.suffix_of(name) != files.suffix_of(file.filename):
        raise ApiError(
            400, f"the name must end in {files.suffix_of(file.filename)}, as the file is of that kind", param="new_filename"
        )
    changed = platform_of(request).store.change(File, file.id, {"filename": name}) or file
    audit(platform_of(request), caller, "file.rename", file_id, filename=name)
    return _object(changed)


def _object(file: File) -> dict[str, Any]:
    suffix = files.suffix_of(file.filename).split(".")[1]
    return {
        "id": file.id,
        "object": "file",
        "created_at": zulu(file.created_at),
        "type": suffix,
        "purpose": file.purpose if file.purpose in PURPOSES else None,
        "filename": file.filename,
        "bytes": file.bytes,
        "created_by": file.project,
        "origin_file_id": None,
        "deleted": False,
    }
