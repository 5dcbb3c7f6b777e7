"""Validate data files without training anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preftune.core.errors import InputError
from preftune.core.records import Excluded


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found: formats by file, good and bad rows, counts by reason and the length audit."""

    formats: dict[str, str]
    num_good: int
    bad_rows: list[Excluded]
    left_out: dict[str, int]
    audit: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 when every row is good, else 1."""
        return 1 if self.bad_rows else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "formats": self.formats,
            "num_good": self.num_good,
            "num_bad": len(self.bad_rows),
            "bad_rows": [row.to_dict() for row in self.bad_rows],
            "left_out": self.left_out,
            "audit": self.audit,
        }

    def summary(self) -> list[str]:
        """The last lines that a person reads."""
        lines = [f"{file}: format {name}" for file, name in self.formats.items()]
        lines.append(f"{self.num_good} good rows, {len(self.bad_rows)} bad rows")
        if self.left_out:
            lines.append("reasons: " + ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items())))
        return lines


def check(files: Sequence[str], format_name: str | None = None) -> CheckReport:
    """Read every row of the files as the trainer would.

    Raises
        InputError: a file cannot be read at all (missing, empty, of no known format).
    """
    from preftune.data.audit import audit_lengths
    from preftune.data.pipeline import read_examples

    if not files:
        raise InputError("no file given; name at least one")
    result = read_examples(files, format=format_name)
    return CheckReport(
        formats=result.formats,
        num_good=len(result.examples),
        bad_rows=result.excluded,
        left_out=result.counts,
        audit=audit_lengths(result.examples),
    )
