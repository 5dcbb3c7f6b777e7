"""Aliases: movable names of models, each with its history."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request

from preftune.app.jobs.aliases import clear_alias, find_alias, set_alias
from preftune.core import api
from preftune.server.errors import not_found
from preftune.server.lookup import platform_of
from preftune.server.native import shown
from preftune.server.native.paging import PartOf, page_of
from preftune.server.security import Caller, CallerOf, audit
from preftune.store.base import Query as Asked
from preftune.store.records import Alias, Event

router = APIRouter(prefix="/api/v1/aliases", tags=["models"])
Name = Annotated[str, Path(max_length=64, pattern=api.NAME)]


@router.get("")
def list_aliases(request: Request, caller: CallerOf, asked: PartOf) -> api.Page[api.Alias]:
    """Aliases of the project. One that was taken away is listed with an empty model, because its history stays."""
    platform = platform_of(request)
    return page_of(platform, Alias, asked, caller.project, lambda one: shown.alias(platform, one))


@router.get("/{name}")
def get_alias(request: Request, caller: CallerOf, name: Name) -> api.Alias:
    """Where an alias points."""
    return shown.alias(platform_of(request), _alias(request, caller, name))


@router.put("/{name}")
def put_alias(request: Request, caller: CallerOf, name: Name, body: api.SetAlias) -> api.Alias:
    """Point an alias to a model; clients that ask by the alias are answered by it from now on."""
    caller.must_be("developer")
    platform = platform_of(request)
    alias = set_alias(platform, caller.project, name, body.model, reason=body.reason, actor=caller.key)
    audit(platform, caller, "alias.set", alias.id, name=name, model=alias.model)
    return shown.alias(platform, alias)


@router.delete("/{name}")
def delete_alias(request: Request, caller: CallerOf, name: Name) -> api.Deleted:
    """Let an alias point nowhere; its history stays."""
    caller.must_be("developer")
    alias = _alias(request, caller, name)
    clear_alias(platform_of(request), alias, actor=caller.key)
    audit(platform_of(request), caller, "alias.delete", alias.id, name=name)
    return api.Deleted(id=alias.id)


@router.get("/{name}/history")
def history(request: Request, caller: CallerOf, name: Name, asked: PartOf) -> api.Page[api.Event]:
    """Where an alias pointed, who moved it and why."""
    platform = platform_of(request)
    kept = platform.store.page(Alias, Asked(caller.project, {"name": name}, limit=1)).items
    if not kept:
        raise not_found("alias", name)
    return page_of(platform, Event, asked, caller.project, shown.event, where={"subject": kept[0].id})


def _alias(request: Request, caller: Caller, name: str) -> Alias:
    found = find_alias(platform_of(request), caller.project, name)
    if found is None:
        raise not_found("alias", name)
    return found
