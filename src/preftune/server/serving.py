"""What is in memory to be asked: seen, loaded and unloaded by the operator."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from preftune.app.serving.names import served_model
from preftune.app.serving.service import Service
from preftune.core.errors import UsageError
from preftune.server.compat.completions import api_error
from preftune.server.errors import ApiError
from preftune.server.security import Caller, CallerOf, audit
from preftune.serving.protocol import EngineError
from preftune.store.records import ModelVersion

router = APIRouter(prefix="/api/v1/serving")


class Which(BaseModel):
    """A model by name."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=512)]


@router.get("")
async def state(request: Request, caller: CallerOf) -> dict[str, Any]:
    """Every base in memory: its process, answers that grow, requests that wait, adapters and their bytes."""
    caller.must_be("admin")
    try:
        return {"object": "list", "data": await _service(request).state()}
    except EngineError as error:
        raise api_error(error) from None


@router.post("/load")
async def load(request: Request, caller: CallerOf, body: Which) -> dict[str, Any]:
    """Bring a model's base into memory before it is asked."""
    return await _act(request, caller, body, is_load=True)


@router.post("/unload")
async def unload(request: Request, caller: CallerOf, body: Which) -> dict[str, Any]:
    """Take an adapter, or a base with its adapters, out of memory."""
    return await _act(request, caller, body, is_load=False)


async def _act(request: Request, caller: Caller, body: Which, *, is_load: bool) -> dict[str, Any]:
    caller.must_be("admin")
    try:
        model = await run_in_threadpool(served_model, request.app.state.platform, caller.project, body.model)
        service = _service(request)
        await (service.load(model) if is_load else service.unload(model))
    except UsageError as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None
    except EngineError as error:
        raise api_error(error) from None
    await run_in_threadpool(_note, request, caller, model, is_load=is_load)
    return {"object": "serving", "model": body.model, "loaded": is_load}


def _note(request: Request, caller: Caller, model: ModelVersion, *, is_load: bool) -> None:
    audit(request.app.state.platform, caller, "serving.load" if is_load else "serving.unload", model.id)


def _service(request: Request) -> Service:
    service: Service = request.app.state.serving
    return service
