"""Where things live on this machine: runs, the reference cache, the use counts of verdict sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from preftune.app.hooks import Hooks


@dataclass(frozen=True, slots=True)
class Context:
    """Folders that outlive a run.

    cache: reference log-probabilities, safe to delete. state: what must be kept, such as how often a verdict set
    was used. hooks: what a Python caller handed to this run.
    ``PREFTUNE_CACHE`` and ``PREFTUNE_HOME`` move them; the XDG defaults apply otherwise.
    """

    cache: Path
    state: Path
    hooks: Hooks = field(default_factory=Hooks)

    @classmethod
    def from_environment(cls) -> Context:
        """The folders that the environment names."""
        return cls(
            cache=_folder("PREFTUNE_CACHE", "XDG_CACHE_HOME", ".cache"),
            state=_folder("PREFTUNE_HOME", "XDG_DATA_HOME", ".local/share"),
        )

    @property
    def reference_cache(self) -> Path:
        """Folder of the reference cache."""
        return self.cache / "reference"


def _folder(own: str, xdg: str, below_home: str) -> Path:
    if os.environ.get(own):
        return Path(os.environ[own]).expanduser()
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / below_home) / "preftune"
