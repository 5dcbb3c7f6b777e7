"""The rows of ``metrics.jsonl`` as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Series(NamedTuple):
    """One metric: the steps at which it is known, and its values there."""

    steps: list[int]
    values: list[float]


def series_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """A column for each metric, in the order in which they first appear.

    >>> series_of([{"step": 1, "loss": 0.7}, {"step": 1, "kl": 0.1}, {"step": 2, "loss": 0.6}])["loss"]
    Series(steps=[1, 2], values=[0.7, 0.6])
    """
    found: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                column = found.setdefault(name, Series([], []))
                column.steps.append(int(row["step"]))
                column.values.append(float(value))
    return found
