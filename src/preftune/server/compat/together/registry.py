"""Together's list of models (v2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from preftune.app.jobs.models import find_model, list_models, max_tokens_of
from preftune.core.errors import UsageError
from preftune.server.compat.together.account import project_of
from preftune.server.errors import not_found
from preftune.server.lookup import platform_of
from preftune.server.security import Caller, CallerOf
from preftune.server.views import zulu
from preftune.store.records import ModelVersion

router = APIRouter(prefix="/v2")


@router.get("/supported-models")
def supported_models(request: Request, caller: CallerOf, search: str = "") -> dict[str, Any]:
    """Base models that jobs may start from."""
    listed = list_models(platform_of(request), caller.project)
    rows = [_supported(model) for model in listed if model.form == "base" and search.lower() in model.name.lower()]
    return {"data": rows, "next_cursor": None, "object": "list"}


@router.get("/supported-models/{model_id}")
def supported_model(request: Request, caller: CallerOf, model_id: str) -> dict[str, Any]:
    """One base model."""
    model = registered(request, caller, model_id)
    if model.form != "base":
        raise not_found("supported model", model_id)
    return _supported(model)


@router.get("/projects/{project_id}/models")
def models(request: Request, caller: CallerOf, project_id: str) -> dict[str, Any]:
    """Models that the project's jobs made."""
    check_project(request, caller, project_id)
    listed = [model for model in list_models(platform_of(request), caller.project) if model.form != "base"]
    return {"data": [_object(request, caller, model) for model in listed], "next_cursor": None, "object": "list"}


@router.get("/projects/{project_id}/models/{model_id}")
def model(request: Request, caller: CallerOf, project_id: str, model_id: str) -> dict[str, Any]:
    """One model."""
    check_project(request, caller, project_id)
    return _object(request, caller, registered(request, caller, model_id))


@router.get("/projects/{project_id}/models/{model_id}/files")
def model_files(request: Request, caller: CallerOf, project_id: str, model_id: str) -> dict[str, Any]:
    """The files of a model's folder on the server, with their sizes."""
    check_project(request, caller, project_id)
    found = registered(request, caller, model_id)
    folder = Path(found.run)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() and found.form != "base" else []
    rows = [{"path": path.name, "sizeBytes": str(path.stat().st_size)} for path in files]
    total = sum(path.stat().st_size for path in files)
    return {
        "data": rows, "object": "list", "next_cursor": None, "revisionId": revision_of(found), "totalSizeBytes": str(total),
        "revisionCreatedAt": zulu(found.created_at),
    }  # fmt: skip


@router.get("/projects/{project_id}/models/{model_id}/revisions")
def model_revisions(request: Request, caller: CallerOf, project_id: str, model_id: str) -> dict[str, Any]:
    """The one revision of a model: versions are immutable here."""
    check_project(request, caller, project_id)
    found = registered(request, caller, model_id)
    row = {"revisionId": revision_of(found), "createdAt": zulu(found.created_at)}
    return {"data": [row], "object": "list", "next_cursor": None}


def check_project(request: Request, caller: Caller, project_id: str) -> None:
    """404 for a project that is not the key's own."""
    project = project_of(request, caller)
    if project_id not in {project.id, project.name}:
        raise not_found("project", project_id)


def registered(request: Request, caller: Caller, given: str) -> ModelVersion:
    """A model by id, by name, or by ``projects/PROJECT/models/ID``; 404 where it is not there."""
    platform = platform_of(request)
    model_id = given.rpartition("/")[2] if given.startswith("projects/") else given
    found = platform.store.get(ModelVersion, model_id)
    if found is not None and (found.project == caller.project or found.form == "base"):
        return found
    slug = f"{project_of(request, caller).name}/"
    try:
        return find_model(platform, caller.project, given.removeprefix(slug))
    except UsageError:
        raise not_found("model", given) from None


def revision_of(model: ModelVersion) -> str:
    """The id of a model's one revision."""
    return f"rv_{model.id.removeprefix('ml_')}"


def path_of(model: ModelVersion) -> str:
    """The name of a model as a resource."""
    return f"projects/{model.project}/models/{model.id}"


def _object(request: Request, caller: Caller, model: ModelVersion) -> dict[str, Any]:
    base = platform_of(request).store.get(ModelVersion, model.base) if model.base else None
    return {
        "id": model.id,
        "name": f"{project_of(request, caller).name}/{model.name}",
        "organizationId": f"org_{request.app.state.settings.name}",
        "projectId": model.project,
        "visibility": "VISIBILITY_PRIVATE",
        "weights": {"type": "WEIGHTS_TYPE_ADAPTER" if model.form == "adapter" else "WEIGHTS_TYPE_DEFAULT"},
        "baseModel": path_of(base) if base else "",
        "baseModelId": base.id if base else "",
        "createdAt": zulu(model.created_at),
    }


def _supported(model: ModelVersion) -> dict[str, Any]:
    return {
        "id": model.id,
        "name": model.name,
        "baseModel": path_of(model),
        "baseModelId": model.id,
        "capabilities": ["CAPABILITY_CHAT"],
        "createdAt": zulu(model.created_at),
        "updatedAt": zulu(model.created_at),
        "deploymentProfiles": [],
        "displayName": model.name,
        "displayType": "chat",
        "inputModalities": ["MODALITY_TEXT"],
        "outputModalities": ["MODALITY_TEXT"],
        "products": ["PRODUCT_SERVERLESS", "PRODUCT_FINE_TUNING"],
        "publisher": "preftune",
        "status": "SUPPORTED_MODEL_STATUS_SUPPORTED",
        "contextLength": str(max_tokens_of(model)),
    }
