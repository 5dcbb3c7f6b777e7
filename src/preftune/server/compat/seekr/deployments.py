"""SeekrFlow's deployments: a name for a model that answers while it is promoted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from preftune.server.compat.together.account import project_of
from preftune.server.lookup import every, model_of, platform_of, resource_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import zulu
from preftune.store.records import Resource, new_id, now

router = APIRouter(prefix="/v1/flow/deployments")
TYPE = "seekr.deployment"


class NewDeployment(BaseModel):
    """A deployment with the lengths that SeekrFlow's client allows."""

    name: Annotated[str, Field(min_length=5, max_length=100)]
    description: Annotated[str, Field(min_length=5, max_length=1000)]
    model_type: Literal["Fine-tuned Run", "Base Model"]
    model_id: Annotated[str, Field(min_length=1, max_length=512)]
    n_instances: Annotated[int, Field(ge=1, le=50)]


@router.post("")
def create(request: Request, caller: CallerOf, body: NewDeployment) -> dict[str, Any]:
    """Create a deployment of a run or of a base model; it answers when it is promoted."""
    caller.must_be("developer")
    model = model_of(request, caller, body.model_id)
    told = {**body.model_dump(), "model": model.id, "is_active": False, "updated_at": None, "deployed_at": None}
    made = platform_of(request).store.insert(
        Resource(id=new_id("deployment-"), project=caller.project, type=TYPE, name=body.name, body=told)
    )
    audit(platform_of(request), caller, "deployment.create", made.id, model=model.id)
    return _object(request, caller, made)


@router.get("")
def list_deployments(
    request: Request, caller: CallerOf, skip: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> dict[str, Any]:
    """Deployments, newest first."""
    found = list(every(platform_of(request), Resource, caller.project, {"type": TYPE}))[skip : skip + limit]
    return {"object": "list", "data": [_object(request, caller, one) for one in found]}


@router.get("/{deployment_id}")
def get_deployment(request: Request, caller: CallerOf, deployment_id: str) -> dict[str, Any]:
    """One deployment."""
    return _object(request, caller, resource_of(request, caller, TYPE, deployment_id))


@router.put("/{deployment_id}/{action}")
def act(request: Request, caller: CallerOf, deployment_id: str, action: Literal["promote", "demote"]) -> dict[str, Any]:
    """Let a deployment answer, or no longer."""
    caller.must_be("developer")
    found, moment = resource_of(request, caller, TYPE, deployment_id), now().isoformat()
    body = {**found.body, "is_active": action == "promote", "updated_at": moment}
    if action == "promote":
        body["deployed_at"] = moment
    changed = platform_of(request).store.change(Resource, found.id, {"body": body}) or found
    audit(platform_of(request), caller, f"deployment.{action}", found.id)
    return _object(request, caller, changed)


def _object(request: Request, caller: Caller, found: Resource) -> dict[str, Any]:
    """Tokens are counted by the server's metrics, not here."""
    body = found.body
    return {
        "id": found.id,
        "model_type": body["model_type"],
        "model_id": body["model_id"],
        "name": body["name"],
        "description": body["description"],
        "status": "Active" if body["is_active"] else "Inactive",
        "memory": None,
        "hardware_type": "Dedicated",
        "total_input_tokens": 0,
        "total_output_tokens": 0,
        "created_at": zulu(found.created_at),
        "updated_at": body["updated_at"] or zulu(found.created_at),
        "last_deployed_at": body["deployed_at"],
        "processor": "XEON",
        "n_instances": body["n_instances"],
        "user_id": project_of(request, caller).serial,
        "team_id": None,
    }
