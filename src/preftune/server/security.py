"""Who is asking: API keys by their hash, roles, projects; and what no request may do."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preftune.app.jobs.keys import digest_of
from preftune.app.jobs.platform import Platform
from preftune.server.errors import ApiError, envelope
from preftune.server.settings import ServerSettings
from preftune.store.base import Query
from preftune.store.records import Audit, Key, Role, new_id, now

_RANK: dict[Role, int] = {"annotator": 0, "developer": 1, "admin": 2}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key, its project and its role."""

    key: str
    project: str
    role: Role

    def must_be(self, role: Role) -> None:
        """ApiError 403 unless the caller's role is at least this one."""
        if _RANK[self.role] < _RANK[role]:
            raise ApiError(403, f"this key's role is {self.role}, and the request needs {role}", code="role")


def authenticate(platform: Platform, header: str | None) -> Caller:
    """The caller of an Authorization header: ``Bearer KEY``, or the bare key that SeekrFlow's client sends.

    Raises
        ApiError: 401 without a key, with an unknown or a revoked one.
    """
    text = (header or "").strip()
    if text[:7].lower() == "bearer ":
        text = text[7:].strip()
    if not text:
        raise ApiError(401, "no API key: send Authorization: Bearer KEY", code="missing_api_key")
    found = platform.store.page(Key, Query(None, {"digest": digest_of(text)}, limit=1)).items
    if not found or found[0].revoked_at is not None:
        raise ApiError(401, "the API key is not known here, or was revoked", code="invalid_api_key")
    key = found[0]
    if key.last_used_at is None or (now() - key.last_used_at).total_seconds() > 60:
        platform.store.change(Key, key.id, {"last_used_at": now()})
    return Caller(key.id, key.project, key.role)


def caller_of(request: Request) -> Caller:
    """The dependency of every route but the probes: header only, a cookie never counts."""
    caller = authenticate(request.app.state.platform, request.headers.get("authorization"))
    request.app.state.limiter.take(caller.key)
    request.state.caller = caller
    return caller


CallerOf = Annotated[Caller, Depends(caller_of)]


class Limiter:
    """At most so many requests a minute of one key, by a bucket that fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._rate = per_minute / 60
        self._most = max(1.0, float(per_minute))
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Take one request from a key's bucket; ApiError 429 with Retry-After where it is empty."""
        if self._rate <= 0:
            return
        clock = time.monotonic()
        left, since = self._buckets.get(key, (self._most, clock))
        left = min(self._most, left + (clock - since) * self._rate)
        if left < 1:
            self._buckets[key] = (left, clock)
            wait = (1 - left) / self._rate
            raise ApiError(
                429, f"too many requests of this key; try again in {wait:.0f} s", headers={"Retry-After": f"{wait:.1f}"}
            )
        self._buckets[key] = (left - 1, clock)


def audit(platform: Platform, caller: Caller, action: str, target: str, **detail: Any) -> None:
    """Write down who did what."""
    platform.store.insert(
        Audit(id=new_id("audit_"), project=caller.project, actor=caller.key, action=action, target=target, detail=detail)
    )


def signing_key(home: Path) -> bytes:
    """The key that upload URLs are signed with; made once for an installation, so that they outlive a restart."""
    path = home / "signing.key"
    home.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            whole = home / f".signing-{secrets.token_hex(8)}"
            with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):
                os.link(whole, path)  # the first of several servers wins, and nobody reads half a key
            whole.unlink()
            continue
        return key


def sign(secret: bytes, text: str, expires: int) -> str:
    """A signature of a text that is good until a time (unix seconds)."""
    return hmac.new(secret, f"{text}|{expires}".encode(), hashlib.sha256).hexdigest()


def is_signed(secret: bytes, text: str, expires: int, signature: str) -> bool:
    """Whether a signature is right and its time has not come."""
    return expires > time.time() and hmac.compare_digest(sign(secret, text, expires), signature)


class Gate:
    """Before any route: a known Host, a bounded body, a request id, one ``/v1`` where a client wrote two."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        tell = self._with_id(send, request_id)
        if not self._settings.answers(headers.get("host", "")):
            await _refuse(tell, 400, "the Host header names no host of this server; set allowed hosts")
            return
        if scope["path"].startswith("/v1/v1/"):
            scope["path"] = scope["path"][3:]
        is_upload = _is_upload(scope["method"], scope["path"])
        most = self._settings.max_upload + (1 << 20) if is_upload else self._settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            await _refuse(tell, 413, f"the body is larger than the {most:,} bytes that are allowed here")
            return
        await self._app(scope, _counted(receive, most), tell)

    @staticmethod
    def _with_id(send: Send, request_id: str) -> Callable[[Message], Awaitable[None]]:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"], (b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff"),
                ]  # fmt: skip
            await send(message)

        return tell


def _counted(receive: Receive, most: int) -> Receive:
    """A body that breaks off where it is longer than it may be (no Content-Length, or a wrong one)."""
    seen = 0

    async def take() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise ApiError(413, f"the body is larger than the {most:,} bytes that are allowed here")
        return message

    return take


def _is_upload(method: str, path: str) -> bool:
    heads = ("/v1/files", "/uploads/", "/v1/uploads", "/v1/flow/files", "/v1/flow/bulk_files", "/api/v1/files")
    return method in {"POST", "PUT"} and path.startswith(heads)


async def _refuse(send: Callable[[Message], Awaitable[None]], status: int, message: str) -> None:
    import json

    body = json.dumps(envelope(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
