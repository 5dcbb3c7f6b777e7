"""Together's dedicated endpoints (v2): a name for a model that is served anyway, so a deployment is ready at once."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from preftune.server.compat.together.account import project_of
from preftune.server.compat.together.registry import check_project, path_of, registered, revision_of
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import every, platform_of
from preftune.server.recipes import NAME
from preftune.server.security import Caller, CallerOf, audit
from preftune.server.views import zulu
from preftune.store.records import ModelVersion, Resource, new_id, now

router = APIRouter(prefix="/v2/projects/{project_id}")
ENDPOINT, DEPLOYMENT = "together.endpoint", "together.deployment"
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=NAME)]


class NewEndpoint(BaseModel):
    """An endpoint by its name."""

    model_config = ConfigDict(extra="ignore")
    name: Name


class Replicas(BaseModel):
    """How many copies; none stops a deployment."""

    model_config = ConfigDict(extra="allow")
    minReplicas: Annotated[int, Field(ge=0)] = 1  # noqa: N815 -- the client's word
    maxReplicas: Annotated[int, Field(ge=0)] = 1  # noqa: N815 -- the client's word


class NewDeployment(BaseModel):
    """A model on an endpoint."""

    model_config = ConfigDict(extra="ignore")
    name: Name
    model: str = ""
    modelId: str = ""  # noqa: N815 -- the client's word
    autoscaling: Replicas = Replicas()


class Change(BaseModel):
    """What may be changed of an endpoint or a deployment."""

    model_config = ConfigDict(extra="ignore")
    trafficSplit: list[dict[str, Any]] | None = None  # noqa: N815 -- the client's word
    autoscaling: Replicas | None = None


@router.get("/configs")
def configs(
    request: Request, caller: CallerOf, project_id: str, model_id: Annotated[str, Query(alias="referenceModelId")] = ""
) -> dict[str, Any]:
    """The one way to serve a model; the command line wants exactly one."""
    check_project(request, caller, project_id)
    model = registered(request, caller, model_id)
    one = {
        "id": "cr_preftune", "certifications": [], "projectId": project_id, "referenceModel": path_of(model),
        "referenceModelId": model.id, "selectors": [{"key": "accelerator", "value": "any"}],
    }  # fmt: skip
    return {"data": [one], "next_cursor": None, "object": "list"}


@router.get("/endpoints")
def list_endpoints(request: Request, caller: CallerOf, project_id: str) -> dict[str, Any]:
    """Endpoints of the project."""
    check_project(request, caller, project_id)
    found = every(platform_of(request), Resource, caller.project, {"type": ENDPOINT})
    return {"data": [_endpoint(request, caller, one) for one in found], "next_cursor": None, "object": "list"}


@router.post("/endpoints")
def create_endpoint(request: Request, caller: CallerOf, project_id: str, body: NewEndpoint) -> dict[str, Any]:
    """Create an endpoint; 409 where its name is taken."""
    caller.must_be("developer")
    check_project(request, caller, project_id)
    name = f"{project_of(request, caller).name}/{body.name}"
    if any(True for _ in every(platform_of(request), Resource, caller.project, {"type": ENDPOINT, "name": name})):
        raise ApiError(409, f"endpoint {name!r} exists", param="name", code="exists", headers={"x-should-retry": "false"})
    moment = now().isoformat()
    made = platform_of(request).store.insert(
        Resource(id=new_id("ep_"), project=caller.project, type=ENDPOINT, name=name, body={"split": [], "updated_at": moment})
    )
    audit(platform_of(request), caller, "endpoint.create", made.id, name=name)
    return _endpoint(request, caller, made)


@router.get("/endpoints/{endpoint_id}")
def get_endpoint(request: Request, caller: CallerOf, project_id: str, endpoint_id: str) -> dict[str, Any]:
    """One endpoint."""
    check_project(request, caller, project_id)
    return _endpoint(request, caller, _found(request, caller, ENDPOINT, endpoint_id))


@router.patch("/endpoints/{endpoint_id}")
def change_endpoint(request: Request, caller: CallerOf, project_id: str, endpoint_id: str, body: Change) -> dict[str, Any]:
    """Say which deployment answers: all of the traffic goes to the one of the greatest weight."""
    caller.must_be("developer")
    check_project(request, caller, project_id)
    found = _found(request, caller, ENDPOINT, endpoint_id)
    if body.trafficSplit is not None:
        if sum(float(one.get("weight", 0)) > 0 for one in body.trafficSplit) > 1:
            raise ApiError(400, "traffic goes to one deployment here; give the others weight 0", param="trafficSplit")
        told = {**found.body, "split": body.trafficSplit, "updated_at": now().isoformat()}
        found = platform_of(request).store.change(Resource, found.id, {"body": told}) or found
        _route(request, caller, found)
        audit(platform_of(request), caller, "endpoint.change", found.id)
    return _endpoint(request, caller, found)


@router.delete("/endpoints/{endpoint_id}")
def delete_endpoint(request: Request, caller: CallerOf, project_id: str, endpoint_id: str) -> dict[str, Any]:
    """Delete an endpoint with its deployments."""
    caller.must_be("developer")
    check_project(request, caller, project_id)
    found = _found(request, caller, ENDPOINT, endpoint_id)
    for one in [*_deployments(request, caller, found), found]:
        platform_of(request).store.change(Resource, one.id, {"deleted_at": now()})
    audit(platform_of(request), caller, "endpoint.delete", found.id)
    return {}


@router.get("/endpoints/{endpoint_id}/abExperiments")
@router.get("/endpoints/{endpoint_id}/shadowExperiments")
def list_experiments(request: Request, caller: CallerOf, project_id: str, endpoint_id: str) -> dict[str, Any]:
    """None, and there cannot be any: an endpoint stands for one model. The command line asks before it shows an endpoint."""
    check_project(request, caller, project_id)
    _found(request, caller, ENDPOINT, endpoint_id)
    return {"data": [], "next_cursor": None, "object": "list"}


@router.get("/endpoints/{endpoint_id}/deployments/{deployment_id}/adapters")
def list_adapters(request: Request, caller: CallerOf, project_id: str, endpoint_id: str, deployment_id: str) -> dict[str, Any]:
    """None beside the deployment's own model: adapters are models here, and each answers by its name."""
    _own(request, caller, project_id, endpoint_id, deployment_id)
    return {"data": [], "next_cursor": None, "object": "list"}


@router.get("/endpoints/{endpoint_id}/deployments")
def list_deployments(request: Request, caller: CallerOf, project_id: str, endpoint_id: str) -> dict[str, Any]:
    """Deployments of an endpoint."""
    check_project(request, caller, project_id)
    found = _found(request, caller, ENDPOINT, endpoint_id)
    rows = [_deployment(request, one) for one in _deployments(request, caller, found)]
    return {"data": rows, "next_cursor": None, "object": "list"}


@router.post("/endpoints/{endpoint_id}/deployments")
def create_deployment(
    request: Request, caller: CallerOf, project_id: str, endpoint_id: str, body: NewDeployment
) -> dict[str, Any]:
    """Let an endpoint's name stand for a model."""
    caller.must_be("developer")
    check_project(request, caller, project_id)
    endpoint = _found(request, caller, ENDPOINT, endpoint_id)
    model = registered(request, caller, body.model or body.modelId)
    is_first = not _deployments(request, caller, endpoint)
    told = {
        "name": body.name, "endpoint": endpoint.id, "model": model.id, "replicas": body.autoscaling.model_dump(),
        "is_active": is_first and body.autoscaling.maxReplicas > 0, "updated_at": now().isoformat(),
    }  # fmt: skip
    made = platform_of(request).store.insert(
        Resource(id=new_id("dep_"), project=caller.project, type=DEPLOYMENT, name=endpoint.name, body=told)
    )
    audit(platform_of(request), caller, "deployment.create", made.id, model=model.id)
    return _deployment(request, made)


@router.get("/endpoints/{endpoint_id}/deployments/{deployment_id}")
def get_deployment(request: Request, caller: CallerOf, project_id: str, endpoint_id: str, deployment_id: str) -> dict[str, Any]:
    """One deployment."""
    return _deployment(request, _own(request, caller, project_id, endpoint_id, deployment_id))


@router.patch("/endpoints/{endpoint_id}/deployments/{deployment_id}")
def change_deployment(
    request: Request, caller: CallerOf, project_id: str, endpoint_id: str, deployment_id: str, body: Change
) -> dict[str, Any]:
    """Stop a deployment, with no replicas, or start it again."""
    caller.must_be("developer")
    found = _own(request, caller, project_id, endpoint_id, deployment_id)
    if body.autoscaling is not None:
        told = {
            **found.body, "replicas": body.autoscaling.model_dump(), "is_active": body.autoscaling.maxReplicas > 0,
            "updated_at": now().isoformat(),
        }  # fmt: skip
        found = platform_of(request).store.change(Resource, found.id, {"body": told}) or found
        audit(platform_of(request), caller, "deployment.change", found.id)
    return _deployment(request, found)


@router.delete("/endpoints/{endpoint_id}/deployments/{deployment_id}")
def delete_deployment(
    request: Request, caller: CallerOf, project_id: str, endpoint_id: str, deployment_id: str
) -> dict[str, Any]:
    """Delete a deployment; the model stays and answers by its own name."""
    caller.must_be("developer")
    found = _own(request, caller, project_id, endpoint_id, deployment_id)
    platform_of(request).store.change(Resource, found.id, {"deleted_at": now()})
    audit(platform_of(request), caller, "deployment.delete", found.id)
    return {}


def _found(request: Request, caller: Caller, type_: str, given: str) -> Resource:
    """By id, or an endpoint by its name."""
    store = platform_of(request).store
    found = store.get(Resource, given, caller.project)
    if found is None:
        name = given if "/" in given else f"{project_of(request, caller).name}/{given}"
        found = next(iter(every(platform_of(request), Resource, caller.project, {"type": type_, "name": name})), None)
    if found is None or found.type != type_:
        raise not_found(type_.partition(".")[2], given)
    return found


def _own(request: Request, caller: Caller, project_id: str, endpoint_id: str, deployment_id: str) -> Resource:
    check_project(request, caller, project_id)
    endpoint = _found(request, caller, ENDPOINT, endpoint_id)
    found = platform_of(request).store.get(Resource, deployment_id, caller.project)
    if found is None or found.type != DEPLOYMENT or found.body["endpoint"] != endpoint.id:
        raise not_found("deployment", deployment_id)
    return found


def _deployments(request: Request, caller: Caller, endpoint: Resource) -> list[Resource]:
    found = every(platform_of(request), Resource, caller.project, {"type": DEPLOYMENT, "name": endpoint.name})
    return [one for one in found if one.body["endpoint"] == endpoint.id]


def _route(request: Request, caller: Caller, endpoint: Resource) -> None:
    weights = {str(one.get("deploymentId")): float(one.get("weight", 0)) for one in endpoint.body["split"]}
    for one in _deployments(request, caller, endpoint):
        is_active = weights.get(one.id, 0) > 0
        platform_of(request).store.change(Resource, one.id, {"body": {**one.body, "is_active": is_active}})


def _endpoint(request: Request, caller: Caller, found: Resource) -> dict[str, Any]:
    return {
        "id": found.id,
        "name": found.name,
        "createdAt": zulu(found.created_at),
        "updatedAt": found.body["updated_at"],
        "deployments": [_summary(request, one) for one in _deployments(request, caller, found)],
        "endpointType": "ENDPOINT_TYPE_DEDICATED",
        "etag": found.body["updated_at"],
        "projectId": found.project,
        "trafficSplit": [
            {"deploymentId": one.get("deploymentId", ""), "weight": one.get("weight", 0)} for one in found.body["split"]
        ],
        "visibility": "VISIBILITY_PRIVATE",
    }


def _state(found: Resource) -> str:
    return "DEPLOYMENT_STATE_READY" if found.body["replicas"]["maxReplicas"] > 0 else "DEPLOYMENT_STATE_STOPPED"


def _summary(request: Request, found: Resource) -> dict[str, Any]:
    shown = _deployment(request, found)
    kept = ("id", "autoscaling", "createdAt", "model", "modelId", "name", "trafficMode", "hardware")
    share = 1.0 if found.body["is_active"] else 0.0
    replicas = {"desiredReplicas": found.body["replicas"]["maxReplicas"], "readyReplicas": shown["status"]["readyReplicas"]}
    return {
        **{key: shown[key] for key in kept}, **replicas, "estimatedEffectiveTrafficShare": share, "state": _state(found),
    }  # fmt: skip


def _deployment(request: Request, found: Resource) -> dict[str, Any]:
    body = found.body
    model = platform_of(request).store.get(ModelVersion, body["model"], with_deleted=True)
    assert model is not None
    return {
        "id": found.id,
        "name": body["name"],
        "autoscaling": body["replicas"],
        "config": f"projects/{found.project}/configs/cr_preftune",
        "configId": "cr_preftune",
        "createdAt": zulu(found.created_at),
        "updatedAt": body["updated_at"],
        "endpointId": body["endpoint"],
        "etag": body["updated_at"],
        "hardware": "any",
        "model": path_of(model),
        "modelId": model.id,
        "modelRevisionId": revision_of(model),
        "projectId": found.project,
        "status": {"message": "", "state": _state(found), "readyReplicas": min(1, body["replicas"]["maxReplicas"])},
        "trafficMode": "TRAFFIC_MODE_LIVE",
    }
