"""Bytes of an artifact, whole or a range of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from preftune.server.errors import ApiError, envelope
from preftune.server.lookup import platform_of

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def content_of(request: Request, key: str, media_type: str, *, filename: str = "") -> Response:
    """The bytes under a key: 200, or 206 for ``Range: bytes=A-B`` (one range), or 416 beyond the end.

    The length is always exact, and nothing is compressed on the way: clients resume by it.

    Raises
        ApiError: 404, there are no bytes (yet).
    """
    artifacts = platform_of(request).artifacts
    if not key or not artifacts.exists(key):
        raise ApiError(404, "there are no bytes yet; finish the upload first", param="id", code="no_content")
    size = artifacts.size(key)
    headers = {"Accept-Ranges": "bytes"}
    if filename:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    start, stop, status = 0, size, 200
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if found and any(found.groups()):
        start, stop = _bounds(found.group(1), found.group(2), size)
        status = 206
        if start >= stop:
            body = envelope(416, f"the range lies outside of {size:,} bytes", code="range_not_satisfiable")
            from starlette.responses import JSONResponse

            return JSONResponse(body, 416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"

    def chunks() -> Iterator[bytes]:
        yield from artifacts.read(key, start, stop)

    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(chunks(), status, headers=headers, media_type=media_type)


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
