"""What is in memory to be asked: seen, loaded and unloaded by the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from preftune.app.jobs.models import add_base_model, list_models
from preftune.app.serving.names import served_model
from preftune.app.serving.service import Service
from preftune.core.errors import UsageError
from preftune.core.served import Served, ServedBase, ServedBases
from preftune.server.compat.completions import api_error
from preftune.server.errors import ApiError
from preftune.server.security import Caller, CallerOf, audit
from preftune.serving.placing import ADAPTER_CONFIG, place
from preftune.serving.protocol import EngineError
from preftune.store.records import ModelVersion, now

router = APIRouter(prefix="/api/v1/serving")
adapters = APIRouter(prefix="/v1")


class Which(BaseModel):
    """A model by name."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=512)]


@router.get("", response_model_exclude_none=True)
async def state(request: Request, caller: CallerOf) -> ServedBases:
    """Every base in memory: its process, answers that grow, requests that wait, adapters by name and their bytes."""
    caller.must_be("admin")
    try:
        found = await _service(request).state(caller.project)
        return ServedBases(data=tuple(ServedBase.model_validate(one) for one in found))
    except EngineError as error:
        raise api_error(error) from None


@router.post("/load")
async def load(request: Request, caller: CallerOf, body: Which) -> Served:
    """Bring a model's base into memory before it is asked."""
    return await _act(request, caller, body, is_load=True)


@router.post("/unload")
async def unload(request: Request, caller: CallerOf, body: Which) -> Served:
    """Take an adapter, or a base with its adapters, out of memory."""
    return await _act(request, caller, body, is_load=False)


class Adapter(BaseModel):
    """vLLM's body: a name, and a folder that this machine has."""

    model_config = ConfigDict(extra="ignore")

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = ""


@adapters.post("/load_lora_adapter")
def load_adapter(request: Request, caller: CallerOf, body: Adapter) -> dict[str, Any]:
    """Offer an adapter under a name, as vLLM does; only where the operator named a folder, and only below it."""
    caller.must_be("admin")
    allowed = request.app.state.settings.adapter_folder
    if allowed is None:
        raise ApiError(403, "adapters are not taken by path here; the operator can start the server with --adapter-folder")
    folder = Path(body.lora_path).resolve()
    if not folder.is_relative_to(Path(allowed).resolve()) or not (folder / ADAPTER_CONFIG).is_file():
        raise ApiError(
            400, "lora_path: no adapter below the operator's --adapter-folder", param="lora_path", code="invalid_value"
        )
    platform = request.app.state.platform
    base_of = place(str(folder)).base
    known = {model.run for model in list_models(platform, caller.project)}
    if base_of != str(folder) and base_of not in known:
        raise ApiError(400, "lora_path: the adapter's base is no model of this server", param="lora_path", code="invalid_value")
    add_base_model(platform, body.lora_name, str(folder))
    audit(platform, caller, "adapter.load", body.lora_name, folder=str(folder.relative_to(Path(allowed).resolve())))
    return {"object": "adapter", "lora_name": body.lora_name, "loaded": True}


@adapters.post("/unload_lora_adapter")
async def unload_adapter(request: Request, caller: CallerOf, body: Adapter) -> dict[str, Any]:
    """Take back what ``load_lora_adapter`` offered."""
    caller.must_be("admin")
    platform = request.app.state.platform
    try:
        model = await run_in_threadpool(served_model, platform, caller.project, body.lora_name)
    except UsageError as error:
        raise ApiError(404, str(error), param="lora_name", code="model_not_found") from None
    allowed = request.app.state.settings.adapter_folder
    if allowed is None or not Path(model.run).is_relative_to(Path(allowed).resolve()):
        raise ApiError(403, "this model was not offered by load_lora_adapter", param="lora_name")
    await _service(request).unload(model)
    await run_in_threadpool(platform.store.change, ModelVersion, model.id, {"deleted_at": now()})
    return {"object": "adapter", "lora_name": body.lora_name, "loaded": False}


async def _act(request: Request, caller: Caller, body: Which, *, is_load: bool) -> Served:
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
    return Served(model=body.model, loaded=is_load)


def _note(request: Request, caller: Caller, model: ModelVersion, *, is_load: bool) -> None:
    audit(request.app.state.platform, caller, "serving.load" if is_load else "serving.unload", model.id)


def _service(request: Request) -> Service:
    service: Service = request.app.state.serving
    return service
