"""Where announced bytes are put: URLs that are signed for one file or part, and need no key (Together's clients send none)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from preftune.app.jobs import uploads
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import platform_of
from preftune.server.security import is_signed
from preftune.server.uploads import with_body
from preftune.store.records import File, Upload

router = APIRouter(prefix="/uploads")


@router.put("/{file_id}")
async def put_file(request: Request, file_id: str, exp: int = 0, sig: str = "") -> Response:
    """The bytes of an announced file. The answer is exactly 200: Together's client takes nothing else."""
    platform = platform_of(request)
    _check(request, file_id, exp, sig)
    file = platform.store.get(File, file_id)
    if file is None:
        raise not_found("file", file_id)
    most = request.app.state.settings.max_upload
    kept = await with_body(request, lambda chunks: uploads.fill(platform, file, chunks, max_bytes=most))
    return JSONResponse({"id": kept.id, "bytes": kept.bytes}, headers={"ETag": f'"{kept.sha256[:32]}"'})


@router.put("/{upload_id}/{part}")
async def put_part(request: Request, upload_id: str, part: str, exp: int = 0, sig: str = "") -> Response:
    """One part of an upload; its ETag names it when the upload is completed."""
    platform = platform_of(request)
    _check(request, f"{upload_id}/{part}", exp, sig)
    upload = platform.store.get(Upload, upload_id)
    if upload is None:
        raise not_found("upload", upload_id)
    etag, _ = await with_body(request, lambda chunks: uploads.add_part(platform, upload, part, chunks))
    return JSONResponse({"part": part}, headers={"ETag": f'"{etag}"'})


def _check(request: Request, path: str, expires: int, signature: str) -> None:
    if not is_signed(request.app.state.signing_key, path, expires, signature):
        raise ApiError(
            403, "the upload URL is not signed by this server, or has expired; announce the file again", code="signature"
        )
