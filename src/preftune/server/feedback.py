"""What people say of served completions, and the traffic of a name split between two versions."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from preftune.app.jobs.platform import Platform
from preftune.app.serving.capture import Spoken, captured, rows, speak
from preftune.app.serving.splits import SPLIT, find_split, open_split, result
from preftune.core.api import Page
from preftune.core.errors import UsageError
from preftune.core.served import Feedback, FeedbackKept, FeedbackKind, Split, SplitRequest
from preftune.server.errors import ApiError, not_found
from preftune.server.native.paging import PartOf, page_of
from preftune.server.security import CallerOf, audit
from preftune.store.records import Resource, now

router = APIRouter(prefix="/api/v1")


def _platform(request: Request) -> Platform:
    platform: Platform = request.app.state.platform
    return platform


@router.post("/feedback")
def give_feedback(request: Request, caller: CallerOf, body: Feedback) -> FeedbackKept:
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
    return FeedbackKept(id=kept.id, completion_id=body.completion_id, choice=body.choice)


@router.get(
    "/feedback/export", response_class=StreamingResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)  # fmt: skip
def export_feedback(request: Request, caller: CallerOf, kind: FeedbackKind = "preferences") -> StreamingResponse:
    """Feedback of the project as a file that ``preftune check`` and a job read: pairs (and edits), or labelled answers."""
    caller.must_be("developer")
    platform = _platform(request)

    def lines() -> Iterator[str]:
        for row in rows(platform, caller.project, kind):
            yield json.dumps(row, ensure_ascii=False) + "\n"

    headers = {"Content-Disposition": f'attachment; filename="{kind}.jsonl"'}
    return StreamingResponse(lines(), media_type="application/jsonl", headers=headers)


@router.post("/splits")
def create_split(request: Request, caller: CallerOf, body: SplitRequest) -> Split:
    """Split the traffic of a new name between two models."""
    caller.must_be("developer")
    platform = _platform(request)
    made = open_split(platform, caller.project, body.name, body.models, body.weight)
    audit(platform, caller, "split.create", made.id, name=body.name, models=body.models, weight=body.weight)
    return _shown(platform, made)


@router.get("/splits")
def list_splits(request: Request, caller: CallerOf, asked: PartOf) -> Page[Split]:
    """Open splits, with their results."""
    platform = _platform(request)
    return page_of(platform, Resource, asked, caller.project, lambda one: _shown(platform, one), where={"type": SPLIT})


@router.get("/splits/{name:path}")
def get_split(request: Request, caller: CallerOf, name: str) -> Split:
    """The result so far."""
    return _shown(_platform(request), _split(request, caller.project, name))


@router.delete("/splits/{name:path}")
def close_split(request: Request, caller: CallerOf, name: str) -> Split:
    """End a split: its name answers no more; what was kept stays."""
    caller.must_be("developer")
    platform = _platform(request)
    split = _split(request, caller.project, name)
    told = _shown(platform, split)
    platform.store.change(Resource, split.id, {"deleted_at": now()})
    audit(platform, caller, "split.close", split.id, name=name)
    return told.model_copy(update={"deleted": True})


def _shown(platform: Platform, split: Resource) -> Split:
    return Split.model_validate(result(platform, split))


def _split(request: Request, project: str, name: str) -> Resource:
    split = find_split(_platform(request), project, name)
    if split is None:
        raise not_found("split", name)
    return split
