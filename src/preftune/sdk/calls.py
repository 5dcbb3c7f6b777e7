"""Requests of the native API as values: what both clients send, and what the answers are read as."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from preftune.core import api

T = TypeVar("T")
W = TypeVar("W", bound=api.Word)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request.

    reads: the model of its answer. is_repeatable: sending it twice does what sending it once does, so it is retried after
    any failure; others only where the server said that nothing was done.
    """

    method: str
    path: str
    reads: type[T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True


def get(path: str, reads: type[T], **params: Any) -> Call[T]:
    """A question."""
    return Call("GET", path, reads, _given(params))


def page(path: str, reads: type[W], **params: Any) -> Call[api.Page[W]]:
    """A page of a list."""
    return Call("GET", path, api.Page[reads], _given(params))  # type: ignore[valid-type]  # pydantic's own way to fill a generic


def post(path: str, reads: type[T], body: Any = None) -> Call[T]:
    """Something that is done once: two of them are two."""
    return Call("POST", path, reads, body=body, is_repeatable=False)


def put(path: str, reads: type[T], body: Any) -> Call[T]:
    """Something that may be said twice."""
    return Call("PUT", path, reads, body=body)


def delete(path: str, reads: type[T]) -> Call[T]:
    """Take a thing away."""
    return Call("DELETE", path, reads)


def create_job(fields: Mapping[str, Any], key: str | None) -> Call[api.JobDetail]:
    """A new job under an idempotency key, so that a retry makes no second one."""
    body = {name: value for name, value in fields.items() if value is not None}
    headers = {"Idempotency-Key": key or f"sdk-{secrets.token_hex(16)}"}
    return Call("POST", "/api/v1/jobs", api.JobDetail, body=body, headers=headers)


def job_fields(
    recipe: Mapping[str, Any] | None, model: str | None, files: str | Sequence[str] | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``jobs.create`` sends: the server's own fields, and every other key among ``options`` of the stage."""
    own = {name: value for name, value in fields.items() if name in api.NewJob.model_fields}
    options = {name: value for name, value in fields.items() if name not in own}
    made = {"recipe": None if recipe is None else dict(recipe), "model": model, **own}
    if files is not None:
        made["files"] = [files] if isinstance(files, str) else list(files)
    if options:
        made["options"] = {**own.get("options", {}), **options}
    return made


def at(*parts: str) -> str:
    """A path below /api/v1; names are quoted, a slash in them too.

    >>> at("models", "team/one", "lineage")
    '/api/v1/models/team%2Fone/lineage'
    """
    return "/api/v1/" + "/".join(quote(part, safe="") for part in parts)


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. raw: the whole answer in OpenAI's words."""

    text: str
    model: str
    finish_reason: str | None
    raw: Mapping[str, Any]


def chat(model: str, messages: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request; a text is one message of the user's."""
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    return {"model": model, "messages": given, **options}


def answer_of(raw: Mapping[str, Any]) -> Answer:
    """The first choice of an answer."""
    choice = raw["choices"][0]
    return Answer(choice["message"]["content"] or "", raw["model"], choice.get("finish_reason"), raw)
