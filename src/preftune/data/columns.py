"""A declared mapping of a file's own columns to those that a format knows, for files of no known format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.core.errors import InputError, UsageError
from preftune.core.registry import suggest

FIELDS = (
    "prompt", "system", "chosen", "rejected", "first", "second", "label", "strength", "confidence", "completion",
    "completions", "ranks", "edited", "messages", "tools",
)  # fmt: skip
LABELS = ("first", "second", "tie", "true", "false")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what.

    Parameters
        names: field to column; the fields are FIELDS. Columns that are not named are not read.
        labels: value of the label column, as text, to first, second or tie, or to true or false for unpaired completions.

    >>> columns = Columns({"prompt": "q", "first": "a", "second": "b", "label": "who"}, {"1": "first", "2": "second"})
    >>> columns.apply({"q": "?", "a": "x", "b": "y", "who": 2, "id": 7})
    {'prompt': '?', 'first': 'x', 'second': 'y', 'label': 'second'}
    """

    names: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in FIELDS:
                raise UsageError(f"columns: no field {name!r}: {suggest(name, list(FIELDS))}")
        for value, label in self.labels.items():
            if label not in LABELS:
                raise UsageError(f"labels: {value!r} is {label!r}; there is {', '.join(LABELS)}")

    def __bool__(self) -> bool:
        return bool(self.names or self.labels)

    def check(self, row: Mapping[str, Any], path: str) -> None:
        """InputError where a file has none of a named column."""
        for name, column in self.names.items():
            if column not in row:
                raise InputError(f"{path} has no column {column!r} for {name}: {suggest(column, [str(key) for key in row])}")

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under the names that formats know."""
        mapped: dict[str, Any] = {name: row.get(column) for name, column in self.names.items()} if self.names else dict(row)
        if self.labels and mapped.get("label") is not None:
            label = self.labels.get(_as_text(mapped["label"]), mapped["label"])
            mapped["label"] = {"true": True, "false": False}.get(str(label), label)
        system = mapped.pop("system", None)
        prompt = mapped.get("prompt")
        if system and isinstance(prompt, (str, list, tuple)):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            has_one = bool(turns) and isinstance(turns[0], Mapping) and turns[0].get("role") in {"system", "developer"}
            mapped["prompt"] = turns if has_one else [{"role": "system", "content": system}, *turns]
        return mapped

    def given_name(self, name: str | None) -> str | None:
        """What the user calls a field, for messages about bad rows."""
        return name if name is None else self.names.get(name, name)


def _as_text(value: Any) -> str:
    """A label's value as it is written in a mapping: 1 for 1.0, true for True.

    >>> [_as_text(value) for value in (1.0, True, "A")]
    ['1', 'true', 'A']
    """
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdigit() else text


def parse_columns(given: str | None, labels: str | None = None) -> Columns:
    """``prompt=question,chosen=good`` and ``1=first,2=second`` as a mapping.

    >>> parse_columns("prompt=q,chosen=a").names
    {'prompt': 'q', 'chosen': 'a'}
    """
    return Columns(_pairs(given, "--columns", "prompt=question"), _pairs(labels, "--labels", "1=first"))


def _pairs(given: str | None, option: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (given or "").split(","):
        if not part.strip():
            continue
        left, sign, right = part.partition("=")
        if not sign or not left.strip() or not right.strip():
            raise UsageError(f"{option} {part!r}: write pairs such as {example}, with commas between them")
        found[left.strip()] = right.strip()
    return found
