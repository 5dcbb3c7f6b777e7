"""Who may do what: keys, roles, projects; the audit log; health; and this API's own document."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from preftune.app.jobs import keys
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.core import api
from preftune.core.version import __version__
from preftune.server.errors import ApiError, not_found
from preftune.server.lookup import platform_of
from preftune.server.native import shown
from preftune.server.native.document import document_of
from preftune.server.native.paging import PartOf, page_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.store.base import Query as Asked
from preftune.store.records import ACTIVE, Audit, Job, Key, Project

router = APIRouter(prefix="/api/v1", tags=["access"])
Short = Annotated[str | None, Query(max_length=128)]


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request, caller: CallerOf) -> dict[str, Any]:
    """The OpenAPI document of this API."""
    del caller
    return document_of(request.app)


@router.get("/health")
def health(request: Request, caller: CallerOf) -> api.Health:
    """The server and its database answer; what waits and runs in the project."""
    store = platform_of(request).store
    work = {"work": ("train", "evaluate")}
    counts: dict[str, int] = {status: store.count(Job, Asked(caller.project, {**work, "status": status})) for status in ACTIVE}
    return api.Health(status="ok", version=__version__, jobs=counts)


@router.get("/me")
def me(request: Request, caller: CallerOf) -> api.Me:
    """Who asks: the key, its role and its project."""
    project = platform_of(request).store.get(Project, caller.project)
    return api.Me(key=caller.key, role=caller.role, project=caller.project, project_name=project.name if project else "")


@router.get("/keys")
def list_keys(request: Request, caller: CallerOf, asked: PartOf) -> api.Page[api.Key]:
    """Keys of the project, revoked ones too; never a value."""
    caller.must_be("admin")
    return page_of(platform_of(request), Key, asked, caller.project, shown.key)


@router.post("/keys", status_code=201)
def add_key(request: Request, caller: CallerOf, body: api.NewKey) -> api.KeyMade:
    """Make a key. Its value is shown once."""
    caller.must_be("admin")
    platform = platform_of(request)
    project = caller.project if body.project is None else _named(platform, caller, body.project).id
    made, value = keys.add_key(platform, project, body.name, body.role)
    audit(platform, caller, "key.create", made.id, name=made.name, role=made.role, project=project)
    return api.KeyMade(**shown.key(made).model_dump(), value=value)


@router.delete("/keys/{key_id}")
def revoke_key(request: Request, caller: CallerOf, key_id: str) -> api.Key:
    """Revoke a key: from now on it is answered with 401."""
    caller.must_be("admin")
    platform = platform_of(request)
    if platform.store.get(Key, key_id, caller.project) is None:
        raise not_found("key", key_id)
    if key_id == caller.key:
        raise ApiError(409, "this is the key that asks; revoke it with another admin's", code="own_key", headers=_FINAL)
    revoked = keys.revoke_key(platform, key_id, caller.project)
    audit(platform, caller, "key.revoke", key_id)
    return shown.key(revoked)


@router.get("/projects")
def list_projects(request: Request, caller: CallerOf, asked: PartOf) -> api.Page[api.Project]:
    """The caller's project; an admin of the default project sees all."""
    platform = platform_of(request)
    is_operator = _is_operator(platform, caller)
    return page_of(platform, Project, asked, None if is_operator else caller.project, shown.project)


@router.post("/projects", status_code=201)
def add_project(request: Request, caller: CallerOf, body: api.NewProject) -> api.Project:
    """Make a project; only an admin of the default project may."""
    platform = platform_of(request)
    _must_be_operator(platform, caller)
    if platform.store.page(Project, Asked(None, {"name": body.name}, limit=1)).items:
        raise ApiError(
            409, f"there is a project {body.name!r} already; choose another name", param="name", code="project_exists",
            headers=_FINAL,
        )  # fmt: skip
    made = keys.add_project(platform, body.name, body.description)
    audit(platform, caller, "project.create", made.id, name=made.name)
    return shown.project(made)


@router.get("/audit")
def audit_log(
    request: Request, caller: CallerOf, asked: PartOf, actor: Short = None, action: Short = None
) -> api.Page[api.AuditEntry]:
    """Who did what in the project."""
    caller.must_be("admin")
    return page_of(platform_of(request), Audit, asked, caller.project, shown.audit, where={"actor": actor, "action": action})


_FINAL = {"x-should-retry": "false"}


def _is_operator(platform: Platform, caller: Caller) -> bool:
    return caller.role == "admin" and caller.project == platform.project(DEFAULT_PROJECT).id


def _must_be_operator(platform: Platform, caller: Caller) -> None:
    caller.must_be("admin")
    if not _is_operator(platform, caller):
        raise ApiError(403, "only an admin of the default project may do this; ask the operator", code="role")


def _named(platform: Platform, caller: Caller, name: str) -> Project:
    """A project by its name: one's own, or any for the operator."""
    found = platform.store.page(Project, Asked(None, {"name": name}, limit=1)).items
    if found and found[0].id == caller.project:
        return found[0]
    _must_be_operator(platform, caller)
    if not found:
        raise not_found("project", name)
    return found[0]
