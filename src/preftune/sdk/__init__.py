"""A client of a preftune server: the same nouns as the command line, sync and async. It imports core only, never torch."""

from preftune.core.served import AskedModel, Better
from preftune.sdk.async_client import AsyncClient
from preftune.sdk.calls import Answer
from preftune.sdk.client import Client
from preftune.sdk.errors import (
    ApiError,
    AuthenticationFailed,
    BadRequest,
    Conflict,
    ConnectionFailed,
    JobFailed,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerFailed,
    TooLarge,
    WaitTimedOut,
)
from preftune.sdk.retries import Retries

__all__ = [
    "Answer",
    "ApiError",
    "AskedModel",
    "AsyncClient",
    "AuthenticationFailed",
    "BadRequest",
    "Better",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "JobFailed",
    "NotFound",
    "PermissionDenied",
    "RateLimited",
    "Retries",
    "ServerFailed",
    "TooLarge",
    "WaitTimedOut",
]
