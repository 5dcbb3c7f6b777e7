"""Published recipes that the package carries: everything but the model and the data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from preftune.core.errors import UsageError
from preftune.core.registry import suggest

PREFIX = "preset:"


def list_presets() -> list[dict[str, str]]:
    """Their names and what each one is, by name."""
    rows = []
    for file in sorted(_folder().glob("*.yaml"), key=lambda one: one.stem):
        title = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        rows.append({"name": file.stem, "what": title})
    return rows


def preset_file(given: str) -> Path | None:
    """The file behind ``preset:NAME``; None for anything else.

    Raises
        UsageError: there is no preset of that name.
    """
    if not given.startswith(PREFIX):
        return None
    name = given.removeprefix(PREFIX)
    names = [row["name"] for row in list_presets()]
    if name not in names:
        raise UsageError(f"no preset {name!r}: {suggest(name, names)}")
    return _folder() / f"{name}.yaml"


def preset_overrides(overrides: Sequence[str]) -> list[str]:
    """``data=FILE`` names the file and leaves the preset's length limit as it is."""
    return [f"data.train={one.removeprefix('data=')}" if one.startswith("data=") else one for one in overrides]


def _folder() -> Path:
    return Path(str(files("preftune"))) / "presets"
