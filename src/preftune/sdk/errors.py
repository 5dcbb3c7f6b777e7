"""What a server refuses, as exceptions: one kind for each thing that a caller would do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.core.api import Job
from preftune.core.errors import PreftuneError


class ApiError(PreftuneError):
    """An answer that is no success.

    status: the HTTP status, 0 where no answer came. message: says what to do. param: the field at fault. code: stable, for
    programs. request_id: what the server's log calls the request.
    """

    def __init__(
        self, message: str, *, status: int = 0, type: str = "", param: str | None = None, code: str | None = None,  # noqa: A002 -- the envelope's word
        request_id: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.status, self.type, self.param, self.code = message, status, type, param, code
        self.request_id = request_id


class BadRequest(ApiError):
    """400: the request is wrong, or cannot be done in this state; sending it again changes nothing."""


class AuthenticationFailed(ApiError):
    """401: no key, or one that the server does not know."""


class PermissionDenied(ApiError):
    """403: the key's role may not do this."""


class NotFound(ApiError):
    """404: no such thing in the key's project."""


class Conflict(ApiError):
    """409: something else is there already, or the job's state does not allow it (code ``wrong_state``)."""


class TooLarge(ApiError):
    """413: more bytes than the server takes."""


class RateLimited(ApiError):
    """429, after every retry: too many requests, or a model with a full queue."""


class ServerFailed(ApiError):
    """5xx, after every retry."""


class ConnectionFailed(ApiError):
    """No answer, after every retry: the server is not there, or the network broke."""


class JobFailed(PreftuneError):
    """A job that was waited for did not succeed; ``job`` says why."""

    def __init__(self, job: Job) -> None:
        why = f": {job.error.message}" if job.error else ""
        super().__init__(f"job {job.id} {job.status}{why}")
        self.job = job


class WaitTimedOut(PreftuneError, TimeoutError):
    """What was waited for has not ended in time. It goes on; ``job`` is how it was, where a job was waited for."""

    def __init__(self, message: str, job: Job | None = None) -> None:
        super().__init__(message)
        self.job = job


_KINDS: dict[int, type[ApiError]] = {
    400: BadRequest, 401: AuthenticationFailed, 403: PermissionDenied, 404: NotFound, 409: Conflict, 413: TooLarge,
    429: RateLimited,
}  # fmt: skip


def error_of(status: int, body: Any, headers: Mapping[str, str], url: str) -> ApiError:
    """The exception of an answer; one that is not preftune's (a proxy's page) says so."""
    kind = _KINDS.get(status, ServerFailed if status >= 500 else ApiError)
    request_id = headers.get("x-request-id")
    facts = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(facts, Mapping):
        message = f"{url} answered {status} without saying why; check that the address is a preftune server's"
        return kind(message, status=status, request_id=request_id)
    return kind(
        str(facts.get("message") or f"status {status}"), status=status, type=str(facts.get("type") or ""),
        param=facts.get("param"), code=facts.get("code"), request_id=request_id,
    )  # fmt: skip
