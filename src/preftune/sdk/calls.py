"""Requests of the native API as values: what both clients send, and what the answers are read as."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from preftune.core import api, served
from preftune.core.errors import UsageError
from preftune.sdk.errors import JobFailed

T = TypeVar("T")
W = TypeVar("W", bound=api.Word)
LOOK_SECONDS = 5.0  # a wait with an end looks at the clock at least this often


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request.

    reads: the model of its answer. is_repeatable: sending it twice does what sending it once does, so it is retried after
    any failure; others only where the server said that nothing was done. read_seconds: how long the answer may be silent,
    where that is another time than the client's.
    """

    method: str
    path: str
    reads: type[T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True
    read_seconds: float | None = None


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


def put_by_post(path: str, reads: type[T], body: Any) -> Call[T]:
    """Something that may be said twice, where the route is a POST."""
    return Call("POST", path, reads, body=body)


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


def evaluation(kind: str, file_id: str, judge: str | served.AskedModel, given: Mapping[str, Any]) -> Call[served.EvaluationMade]:
    """A new evaluation of a file's rows, under an idempotency key."""
    told = (judge if isinstance(judge, served.AskedModel) else served.AskedModel(model=judge)).as_judge()
    body = {"type": kind, "parameters": {"input_data_file_path": file_id, "judge": told, **given}}
    headers = {"Idempotency-Key": f"sdk-{secrets.token_hex(16)}"}
    return Call("POST", "/v1/evaluation", served.EvaluationMade, body=body, headers=headers)


def contest(fields: Mapping[str, Any]) -> Call[api.JobDetail]:
    """A new comparison of two sides, under an idempotency key."""
    body = {name: value for name, value in fields.items() if value is not None}
    headers = {"Idempotency-Key": f"sdk-{secrets.token_hex(16)}"}
    return Call("POST", "/api/v1/evaluations", api.JobDetail, body=body, headers=headers)


def rows_of(evaluation: api.JobDetail) -> Call[bytes]:
    """The judged rows of an evaluation.

    Raises
        JobFailed: it has not succeeded.
        UsageError: it was made by another API, which keeps its rows.
    """
    if evaluation.status != "succeeded":
        raise JobFailed(evaluation)
    if "result_file_id" not in evaluation.result:
        raise UsageError(f"{evaluation.id} was made through the {evaluation.dialect} API; ask that one for its rows")
    return get(at("files", evaluation.result["result_file_id"], "content"), bytes)


def stream_of(job_id: str, type_: str | None, after: str, seconds_left: float) -> Call[bytes]:
    """A job's events as a stream. seconds_left: where the wait has an end, a silent stream is left in between."""
    look = None if math.isinf(seconds_left) else max(1.0, min(LOOK_SECONDS, seconds_left))
    path = at("jobs", job_id, "stream")
    return Call("GET", path, bytes, _given({"type": type_, "after": after or None}), read_seconds=look)


def still_running(job: api.Job, seconds: float) -> str:
    """What a wait with an end says of a job that goes on."""
    at = job.progress
    step = f", step {at.step}{'' if at.steps is None else f' of {at.steps}'}" if at.step else ""
    return (
        f"job {job.id} has not ended after {seconds:g} s ({job.status}{step}); it goes on: jobs.wait({job.id!r}) waits again, "
        f"jobs.cancel({job.id!r}) ends it"
    )


def side(one: str | served.AskedModel) -> Any:
    """A side of an evaluation: the name of a column, or a model that writes."""
    return one if isinstance(one, str) else one.as_writer()


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

    @property
    def id(self) -> str:
        """What feedback names it by."""
        return str(self.raw["id"])


def chat(model: str, messages: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request; a text is one message of the user's."""
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    return {"model": model, "messages": given, **options}


def answer_of(raw: Mapping[str, Any]) -> Answer:
    """The first choice of an answer."""
    choice = raw["choices"][0]
    return Answer(choice["message"]["content"] or "", raw["model"], choice.get("finish_reason"), raw)
