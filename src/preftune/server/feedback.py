"""What people say of served completions, and the traffic of a name split between two versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import StreamingResponse

from preftune.app.jobs.platform import Platform
from preftune.app.serving.capture import Spoken, captured, rows, speak
from preftune.app.serving.splits import SPLIT, find_split, open_split, result
from preftune.core.errors import UsageError
from preftune.server.errors import ApiError, not_found
from preftune.server.security import CallerOf, audit
from preftune.store.base import Query
from preftune.store.records import Resource, now

router = APIRouter(prefix="/api/v1")
Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Better(_Body):
    """The completion that the one in question is better than, or as good as."""

    over: Annotated[str, Field(min_length=1, max_length=128)]
    choice: Annotated[int, Field(ge=0, le=127)] = 0
    tie: bool = False
    strength: Annotated[float, Field(ge=0, le=3)] = 0.0


class Feedback(_Body):
    """Of one completion: a rating from 0 (bad) to 1 (good), a preference over another one, an edit; at least one."""

    completion_id: Annotated[str, Field(min_length=1, max_length=128)]
    choice: Annotated[int, Field(ge=0, le=127)] = 0
    rating: Annotated[float, Field(ge=0, le=1)] | None = None
    preference: Better | None = None
    edit: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None


class SplitRequest(_Body):
    """A new split: its name, two models, and the share of requests that the second one gets."""

    name: Name
    models: Annotated[list[Name], Field(min_length=2, max_length=2)]
    weight: float = 0.5


def _platform(request: Request) -> Platform:
    platform: Platform = request.app.state.platform
    return platform


@router.post("/feedback")
def give_feedback(request: Request, caller: CallerOf, body: Feedback) -> dict[str, Any]:
    """Rate a kept completion, prefer it to another one, or correct it."""
    platform = _platform(request)
    try:
        capture = captured(platform, caller.project, body.completion_id, body.choice)
        better = body.preference
        over = None if better is None else captured(platform, caller.project, better.over, better.choice)
    except UsageError as error:
        raise ApiError(404, str(error), param="completion_id", code="completion_not_found") from None
    said = Spoken(
        caller.key, body.rating, over, better is not None and better.tie, better.strength if better else 0.0, body.edit
    )  # fmt: skip
    kept = speak(platform, capture, said)
    return {"object": "feedback", "id": kept.id, "completion_id": body.completion_id, "choice": body.choice}


@router.get(
    "/feedback/export", response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)  # fmt: skip
def export_feedback(
    request: Request, caller: CallerOf, kind: Literal["preferences", "ratings"] = "preferences"
) -> StreamingResponse:
    """Feedback of the project as a file that ``preftune check`` and a job read: pairs (and edits), or labelled answers."""
    caller.must_be("developer")
    platform = _platform(request)

    def lines() -> Iterator[str]:
        for row in rows(platform, caller.project, kind):
            yield json.dumps(row, ensure_ascii=False) + "\n"

    headers = {"Content-Disposition": f'attachment; filename="{kind}.jsonl"'}
    return StreamingResponse(lines(), media_type="application/jsonl", headers=headers)


@router.post("/splits")
def create_split(request: Request, caller: CallerOf, body: SplitRequest) -> dict[str, Any]:
    """Split the traffic of a new name between two models."""
    caller.must_be("developer")
    platform = _platform(request)
    made = open_split(platform, caller.project, body.name, body.models, body.weight)
    audit(platform, caller, "split.create", made.id, name=body.name, models=body.models, weight=body.weight)
    return result(platform, made)


@router.get("/splits")
def list_splits(request: Request, caller: CallerOf) -> dict[str, Any]:
    """Open splits, with their results."""
    platform = _platform(request)
    found = platform.store.page(Resource, Query(caller.project, {"type": SPLIT}, limit=100)).items
    return {"object": "list", "data": [result(platform, one) for one in found]}


@router.get("/splits/{name:path}")
def get_split(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """The result so far."""
    return result(_platform(request), _split(request, caller.project, name))


@router.delete("/splits/{name:path}")
def close_split(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """End a split: its name answers no more; what was kept stays."""
    caller.must_be("developer")
    platform = _platform(request)
    split = _split(request, caller.project, name)
    told = result(platform, split)
    platform.store.change(Resource, split.id, {"deleted_at": now()})
    audit(platform, caller, "split.close", split.id, name=name)
    return {**told, "deleted": True}


def _split(request: Request, project: str, name: str) -> Resource:
    split = find_split(_platform(request), project, name)
    if split is None:
        raise not_found("split", name)
    return split
