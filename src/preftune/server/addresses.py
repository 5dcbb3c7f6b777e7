"""The address that clients reach this server by: what absolute URLs begin with, and nothing that a stranger could choose."""

from __future__ import annotations

import time

from starlette.requests import Request

from preftune.server.errors import ApiError
from preftune.server.security import sign
from preftune.server.settings import ServerSettings

UPLOAD_SECONDS = 6 * 3600


def public_url(request: Request) -> str:
    """Scheme and host of this server as its client sees them, without a slash at the end.

    The configured ``public_url``, else the request's own Host, which the gate has checked. X-Forwarded-Proto and
    X-Forwarded-Host count only from an address among ``trusted_proxies``: a signed upload URL goes to this address.

    Raises
        ApiError: 400, a trusted proxy forwarded a host that is none of this server's.
    """
    settings: ServerSettings = request.app.state.settings
    if settings.public_url:
        return settings.public_url.rstrip("/")
    scheme, host = request.url.scheme, request.headers.get("host", "")
    sender = request.client.host if request.client else ""
    if sender in settings.trusted_proxies:
        scheme = _first(request.headers.get("x-forwarded-proto")) or scheme
        host = _first(request.headers.get("x-forwarded-host")) or host
        if scheme not in {"http", "https"} or not settings.answers(host):
            raise ApiError(400, "X-Forwarded-Host names no host of this server; set allowed hosts or a public URL")
    return f"{scheme}://{host}"


def upload_url(request: Request, path: str) -> str:
    """A URL that whoever has it may PUT bytes to, once, for UPLOAD_SECONDS."""
    expires = int(time.time()) + UPLOAD_SECONDS
    signature = sign(request.app.state.signing_key, path, expires)
    return f"{public_url(request)}/uploads/{path}?exp={expires}&sig={signature}"


def _first(value: str | None) -> str:
    """The value that the nearest proxy wrote first of a list."""
    return (value or "").split(",")[0].strip()
