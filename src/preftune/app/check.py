"""Validate data files without training anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preftune.core.records import Excluded

MAX_REPORTED = 10_000


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found: formats by file, good and bad rows, counts by reason and the length audit.

    ``bad_rows`` holds at most MAX_REPORTED of them; ``num_bad`` counts all.
    """

    formats: dict[str, str]
    num_good: int
    num_bad: int
    bad_rows: list[Excluded]
    left_out: dict[str, int]
    audit: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0 when every row is good, else 1."""
        return 1 if self.num_bad else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "formats": self.formats,
            "num_good": self.num_good,
            "num_bad": self.num_bad,
            "bad_rows": [row.to_dict() for row in self.bad_rows],
            "left_out": self.left_out,
            "audit": self.audit,
        }

    def summary(self) -> list[str]:
        """The last lines that a person reads."""
        lines = [f"{file}: format {name}" for file, name in self.formats.items()]
        lines.append(f"{self.num_good} good rows, {self.num_bad} bad rows")
        if self.left_out:
            lines.append("reasons: " + ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items())))
        return lines


def check(
    files: Sequence[str], format_name: str | None = None, *, columns: str | None = None, labels: str | None = None
) -> CheckReport:
    """Read every row of the files as the trainer would, in constant memory.

    columns, labels: ``prompt=question,chosen=good`` and ``1=first,2=second``, for files of no known format.

    Raises
        UsageError: a mapping that makes no sense.
        InputError: a file cannot be read at all (missing, empty, of no known format).
    """
    from preftune.data.audit import Audit
    from preftune.data.columns import parse_columns
    from preftune.data.pipeline import check_files

    audit = Audit()
    mapping = parse_columns(columns, labels)
    result = check_files(files, format=format_name, columns=mapping, max_reported=MAX_REPORTED, on_example=audit.add)
    reasons = {reason: count for reason, count in result.counts.items() if reason not in {"rows", "kept"}}
    return CheckReport(
        formats=result.formats,
        num_good=result.counts.get("kept", 0),
        num_bad=result.num_excluded,
        bad_rows=result.excluded,
        left_out=reasons,
        audit=audit.report(),
    )
