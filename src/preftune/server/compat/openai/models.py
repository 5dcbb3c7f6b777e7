"""OpenAI's list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from preftune.app.jobs.models import delete_model as remove
from preftune.app.jobs.models import list_models
from preftune.server.errors import ApiError
from preftune.server.lookup import model_of, platform_of
from preftune.server.security import CallerOf, audit
from preftune.server.views import seconds
from preftune.store.records import ModelVersion

router = APIRouter(prefix="/v1")


@router.get("/models")
def models(request: Request, caller: CallerOf) -> JSONResponse:
    """Models that this project may use; Together's older packages want the bare list."""
    listed = [_model_object(one) for one in list_models(platform_of(request), caller.project)]
    is_together = request.headers.get("user-agent", "").startswith(("Together/", "AsyncTogether/"))
    if is_together:
        return JSONResponse([{**one, "type": "chat", "pricing": {"input": 0, "output": 0}} for one in listed])
    return JSONResponse({"object": "list", "data": listed})


@router.get("/models/{name:path}")
def get_model(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """One model."""
    return _model_object(model_of(request, caller, name))


@router.delete("/models/{name:path}")
def delete_model(request: Request, caller: CallerOf, name: str) -> dict[str, Any]:
    """Delete a tuned model; base models are the operator's."""
    caller.must_be("developer")
    model = model_of(request, caller, name)
    if model.form == "base":
        raise ApiError(403, f"{name!r} is a base model; only its operator can take it away", code="base_model")
    remove(platform_of(request), model)
    audit(platform_of(request), caller, "model.delete", model.id, name=name)
    return {"id": name, "object": "model", "deleted": True}


def _model_object(model: ModelVersion) -> dict[str, Any]:
    owner = "preftune" if model.form == "base" else model.project
    return {"id": model.name, "object": "model", "created": seconds(model.created_at), "owned_by": owner}
