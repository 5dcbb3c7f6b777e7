"""API keys and projects: made, listed, revoked. A key's value is given back once, and only its hash is kept."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime
from typing import Any

from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.store.base import MAX_PAGE, Conflict, Query
from preftune.store.records import Key, Project, Role, new_id, now

PREFIX = "pt-"
MIN_KEY = 16
_PLAIN = re.compile(r"[\x21-\x7e]{1,512}")


def digest_of(key: str) -> str:
    """What is kept of a key. Keys are long random texts, so a fast hash cannot be guessed backwards."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(platform: Platform, project: str, name: str, role: Role = "developer", value: str | None = None) -> tuple[Key, str]:
    """Make a key; its value is given back once and never kept.

    Raises
        UsageError: a value that is too short to be safe, or that another key has; a name that cannot be printed.
    """
    text = value or PREFIX + secrets.token_urlsafe(32)
    if len(text) < MIN_KEY or not _PLAIN.fullmatch(text):
        raise UsageError(f"a key has at least {MIN_KEY} printable characters without blanks; leave it out to have one made")
    if not name.strip() or not name.isprintable():
        raise UsageError("name: write a few printable characters that say who uses the key")
    key = Key(id=new_id("key_"), project=project, name=name, role=role, digest=digest_of(text), prefix=text[:7])
    try:
        return platform.store.insert(key), text
    except Conflict:
        raise UsageError("another key has this value; leave it out to have one made") from None


def revoke_key(platform: Platform, key_id: str, project: str | None = None) -> Key:
    """A key that no request is answered with any more; one that was revoked before stays as it is.

    Raises
        UsageError: there is no such key (in that project).
    """
    key = platform.store.get(Key, key_id, project)
    if key is None:
        raise UsageError(f"there is no key {key_id!r}; `preftune keys list` lists them")
    return platform.store.change(Key, key_id, {"revoked_at": now()}, expect={"revoked_at": None}) or key


def list_keys(platform: Platform) -> list[dict[str, Any]]:
    """Every key of the installation, newest first, as rows for a person."""
    names = {project.id: project.name for project in platform.store.page(Project, Query(None, limit=MAX_PAGE)).items}
    return [
        {
            "id": key.id, "name": key.name, "role": key.role, "project": names.get(key.project, key.project),
            "prefix": key.prefix, "created_at": _time(key.created_at), "last_used_at": _time(key.last_used_at),
            "revoked_at": _time(key.revoked_at),
        }
        for key in platform.store.page(Key, Query(None, limit=MAX_PAGE)).items
    ]  # fmt: skip


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def check_project_name(name: str) -> None:
    """UsageError unless a project may be named so."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UsageError(f"project {name[:80]!r}: use letters, digits, '.', '_' and '-', at most 64 of them")


def add_project(platform: Platform, name: str, description: str = "") -> Project:
    """Make a project.

    Raises
        UsageError: there is one of that name.
    """
    if platform.store.page(Project, Query(None, {"name": name}, limit=1)).items:
        raise UsageError(f"there is a project {name!r} already; use it, or choose another name")
    made = platform.project(name)
    return platform.store.change(Project, made.id, {"description": description}) or made
