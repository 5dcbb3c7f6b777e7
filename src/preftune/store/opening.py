"""The store that a URL names."""

from __future__ import annotations

from pathlib import Path

from preftune.store.base import Store
from preftune.store.memory import MemoryStore
from preftune.store.sql import SqlStore

MEMORY = "memory:"


def open_store(url: str) -> Store:
    """Open the store of a URL: ``sqlite:///FILE``, ``postgresql://HOST/NAME``, or ``memory:``.

    Raises
        InputError: no URL, another database, or one that a newer preftune wrote.
    """
    return MemoryStore() if url == MEMORY else SqlStore(url)


def default_url(state: Path) -> str:
    """SQLite in the user's data folder."""
    return f"sqlite:///{state / 'preftune.db'}"
