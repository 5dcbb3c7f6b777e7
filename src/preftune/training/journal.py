"""metrics.jsonl: one row for each step and each evaluation, no step twice, however often a run was resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from preftune.core.errors import PreftuneError
from preftune.core.files import append_jsonl, read_jsonl, write_text


class Journal:
    """The rows of a stage, on the disk as soon as they are known.

    Parameters
        path: the file; None keeps the newest values alone, as every rank but the first does.
        step: where the stage stands; rows after it will be computed again and are dropped.

    Attributes
        last: the newest value of every metric.
    """

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.path = path
        self.last: dict[str, float] = {}
        if path is not None and path.exists():
            rows = [row for row in read_jsonl(path) if int(row["step"]) <= step]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            for row in rows:
                self.last |= {name: value for name, value in row.items() if name != "step"}

    def rows(self) -> list[dict[str, float]]:
        """The rows on the disk."""
        return [] if self.path is None else read_jsonl(self.path)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row.

        Raises
            PreftuneError: the disk is full or the file cannot be written.
        """
        self.last |= metrics
        if self.path is None:
            return
        try:
            append_jsonl(self.path, {"step": step, **metrics})
        except OSError as error:
            raise PreftuneError(
                f"metrics of step {step} cannot be written to {self.path}: {error.strerror}; free some space and resume"
            ) from error
