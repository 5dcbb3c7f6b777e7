"""One error envelope for every dialect: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from preftune.app.jobs.states import WrongState
from preftune.core.errors import InputError, PreftuneError, UsageError
from preftune.core.places import without_places
from preftune.store.artifacts import TooLarge
from preftune.store.base import Conflict, StoreUnavailable

log = logging.getLogger("preftune.server")
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 429: "rate_limit_error",
    503: "unavailable_error",
}  # fmt: skip
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NATIVE = "/api/v1"


class ApiError(PreftuneError):
    """An answer that is no success: the status, and what the envelope says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})


def not_found(kind: str, name: str) -> ApiError:
    """404 for a thing that is not there, or belongs to another project."""
    return ApiError(
        404,
        f"no {kind} {name[:80]!r}; check the id, or list what there is",
        param="id",
        code=f"{kind.replace(' ', '_')}_not_found",
    )


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error; a place of the server's machine that its message names is cut to its last name."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": without_places(message), "type": kind, "param": param, "code": code}}


def add_handlers(app: FastAPI) -> None:
    """Turn every exception into the envelope; only a bug of ours becomes a 500, whose story stays in the log."""

    @app.exception_handler(ApiError)
    def _api(request: Request, error: ApiError) -> JSONResponse:
        del request
        return _answer(error.status, str(error), param=error.param, code=error.code, headers=error.headers)

    @app.exception_handler(PreftuneError)
    def _ours(request: Request, error: PreftuneError) -> JSONResponse:
        if isinstance(error, StoreUnavailable):
            log.warning("%s", error)
            return _answer(503, "the database does not answer; try again", code="store_unavailable", headers={"Retry-After": "2"})
        status = 409 if isinstance(error, Conflict) else 413 if isinstance(error, TooLarge) else 400
        if isinstance(error, WrongState) and request.url.path.startswith(NATIVE):
            status = 409  # the vendors' dialects say 400, as their vendors do
        known = (UsageError, InputError, WrongState, Conflict, TooLarge)
        code = "wrong_state" if isinstance(error, WrongState) else None
        final = {"x-should-retry": "false"} if status == 409 else {}
        return _answer(status if isinstance(error, known) else 400, " ".join(str(error).split()), code=code, headers=final)

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in {"body", "query", "path"})
        return _answer(400, f"{where or 'the request'}: {first['msg']}", param=where or None, code="invalid_value")

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            hint = (
                ""
                if request.url.path.startswith(("/v1", "/api", "/v2", "/v3"))
                else "; an OpenAI client's base_url must end in /v1"
            )
            message = f"no route {request.method} {request.url.path}{hint}"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}"
        return _answer(error.status_code, message, headers=dict(error.headers or {}))

    @app.exception_handler(OSError)
    def _system(request: Request, error: OSError) -> JSONResponse:
        if error.errno in FULL:
            log.error("%s %s: %s", request.method, request.url.path, error)
            message = "the server's disk is full and nothing was kept; its operator has to make room, then send it again"
            return _answer(507, message, code="disk_full", headers={"x-should-retry": "false"})
        return _bug(request, error)

    @app.exception_handler(Exception)
    def _bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(500, "an error of the server; its log says more under this request's id")


def _answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(envelope(status, message, param=param, code=code), status, headers=dict(headers or {}))
