"""Aliases: movable names of model versions. Where each one pointed is kept as events, which nobody changes."""

from __future__ import annotations

from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform, event
from preftune.core.errors import UsageError
from preftune.store.base import Conflict, Query
from preftune.store.records import Alias, ModelVersion, new_id, now


def find_alias(platform: Platform, project: str, name: str) -> Alias | None:
    """The alias of that name, if it points anywhere."""
    found = platform.store.page(Alias, Query(project, {"name": name}, limit=1)).items
    return found[0] if found and found[0].model else None


def set_alias(platform: Platform, project: str, name: str, model: str, *, reason: str = "", actor: str = "") -> Alias:
    """Point an alias to a model; its history gets a line. Pointing it where it points already changes nothing.

    Raises
        UsageError: no such model, or a model has that name.
    """
    target = find_model(platform, project, model)
    if _is_taken(platform, project, name):
        raise UsageError(f"a model is named {name!r}; choose another name for the alias")
    while True:
        found = platform.store.page(Alias, Query(project, {"name": name}, limit=1)).items
        before = found[0] if found else None
        if before is not None and before.model == target.id:
            return before
        alias_id = before.id if before is not None else new_id("alias_")
        text = f"{name} points to {target.name} version {target.version}"
        origin = before.model if before is not None else ""
        said = event(alias_id, project, "alias", text, origin=origin, to=target.id, reason=reason, actor=actor)
        if before is None:
            try:
                return platform.store.insert(Alias(id=alias_id, project=project, name=name, model=target.id), [said])
            except Conflict:
                continue  # somebody else made it in between
        moved = {"model": target.id, "updated_at": now()}
        changed = platform.store.change(Alias, alias_id, moved, expect={"model": before.model}, events=[said])
        if changed is not None:
            return changed


def clear_alias(platform: Platform, alias: Alias, *, actor: str = "") -> None:
    """Let an alias point nowhere; its history stays, and the name may be used again."""
    text = f"{alias.name} was taken away"
    said = event(alias.id, alias.project, "alias", text, origin=alias.model, to="", reason="", actor=actor)
    platform.store.change(Alias, alias.id, {"model": "", "updated_at": now()}, expect={"model": alias.model}, events=[said])


def _is_taken(platform: Platform, project: str, name: str) -> bool:
    """Whether a model that the project may use has this very name: an alias would hide it."""
    own = platform.store.page(ModelVersion, Query(project, {"name": name}, limit=1)).items
    return bool(own or platform.store.page(ModelVersion, Query(None, {"name": name, "form": "base"}, limit=1)).items)
