"""SeekrFlow's projects (labels for jobs, inside the project that a key belongs to) and its list of models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from preftune.app.jobs.models import list_models, num_bytes_of
from preftune.server.compat.together.account import project_of
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import every, platform_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import zulu
from preftune.store.base import Query as Asked
from preftune.store.records import Job, Resource, new_id

router = APIRouter(prefix="/v1/flow")
TYPE = "seekr.project"
LABEL = "seekr_project"  # the key of a job's metadata


class NewProject(BaseModel):
    """A project with the lengths that SeekrFlow's client allows."""

    id: int | None = None
    name: Annotated[str, Field(min_length=5, max_length=100)]
    description: Annotated[str, Field(min_length=5, max_length=1000)]


@router.post("/projects")
def create_project(request: Request, caller: CallerOf, body: NewProject) -> dict[str, Any]:
    """Create a project."""
    caller.must_be("developer")
    platform = platform_of(request)
    if body.id is not None:
        raise ApiError(400, "id is given by the server; leave it out", param="id")
    told = {"name": body.name, "description": body.description}
    made = platform.store.insert(Resource(id=new_id("flow_"), project=caller.project, type=TYPE, body=told))
    # its integer is the number that the store gave it, by which it is found from now on
    named = platform.store.change(Resource, made.id, {"name": str(made.number)}) or made
    audit(platform, caller, "project.create", made.id)
    return _object(request, caller, named)


@router.get("/projects")
def list_projects(
    request: Request, caller: CallerOf, skip: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> dict[str, Any]:
    """Projects with the number of their runs."""
    found = list(every(platform_of(request), Resource, caller.project, {"type": TYPE}))[skip : skip + limit]
    return {"data": [_object(request, caller, one) | _runs(request, caller, one) for one in found]}


@router.get("/projects/{number}")
def get_project(request: Request, caller: CallerOf, number: int) -> dict[str, Any]:
    """One project."""
    return _object(request, caller, project_by_number(request, caller, number))


def project_by_number(request: Request, caller: Caller, number: int) -> Resource:
    """A project by its integer; 404 where it is not there."""
    query = Asked(caller.project, {"type": TYPE, "name": str(number)}, limit=1)
    found = platform_of(request).store.page(Resource, query).items
    if not found:
        raise not_found("project", str(number))
    return found[0]


def _runs(request: Request, caller: Caller, project: Resource) -> dict[str, Any]:
    store, label = platform_of(request).store, {LABEL: project.name}
    last = store.page(Job, Asked(caller.project, {"work": "train"}, limit=1, metadata=label)).items
    return {
        "runs": store.count(Job, Asked(caller.project, {"work": "train"}, metadata=label)),
        "runs_deployed": store.count(Job, Asked(caller.project, {"work": "train", "status": "succeeded"}, metadata=label)),
        "last_modified": zulu(last[0].updated_at if last else project.created_at),
    }


def _object(request: Request, caller: Caller, project: Resource) -> dict[str, Any]:
    return {
        "id": int(project.name),
        "name": project.body["name"],
        "description": project.body["description"],
        "user_id": project_of(request, caller).serial,
        "team_id": None,
        "created_at": zulu(project.created_at),
        "updated_at": zulu(project.created_at),
    }


@router.get("/models")
def models(request: Request, caller: CallerOf) -> dict[str, Any]:
    """Models that jobs may start from, each with LoRA, and models that they made."""
    listed = list_models(platform_of(request), caller.project)
    return {
        "object": "list",
        "data": [
            {"id": model.name, "name": model.name, "size": num_bytes_of(model), "model_type": "chat", "supports_lora": True}
            for model in listed
        ],
    }
