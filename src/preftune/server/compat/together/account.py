"""Who is asking, which Together's command line wants to know before every command."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from preftune.server.lookup import platform_of
from preftune.server.security import Caller, CallerOf
from preftune.server.views import zulu
from preftune.store.records import Project

router = APIRouter()


def project_of(request: Request, caller: Caller) -> Project:
    """The caller's project."""
    found = platform_of(request).store.get(Project, caller.project)
    assert found is not None
    return found


@router.get("/v3/whoami")
def whoami(request: Request, caller: CallerOf) -> dict[str, Any]:
    """The key, its project and the organisation."""
    project = project_of(request, caller)
    name = request.app.state.settings.name
    return {
        "type": "project_api_key",
        "api_key": {"id": caller.key},
        "organization": {"id": f"org_{name}", "name": name},
        "project": {"id": project.id, "name": project.name, "slug": project.name},
    }


@router.get("/v1/projects")
def projects(request: Request, caller: CallerOf) -> dict[str, Any]:
    """The one project of the key."""
    project = project_of(request, caller)
    made = zulu(project.created_at)
    one = {
        "id": project.id, "name": project.name, "slug": project.name, "created_at": made, "updated_at": made,
        "organization_id": f"org_{request.app.state.settings.name}",
        "organization_name": request.app.state.settings.name, "description": project.description,
    }  # fmt: skip
    return {"data": [one], "next_cursor": None, "object": "list"}
