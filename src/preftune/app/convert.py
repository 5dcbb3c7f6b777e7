"""Data files from one format to another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preftune.core.errors import UsageError
from preftune.core.records import Excluded

MAX_REPORTED = 1000


@dataclass(frozen=True, slots=True)
class Converted:
    """What was converted: rows written, and those that were not, by reason.

    left_out: rows that could not be read, and rows that the target has no place for (``cannot_hold/REASON``).
    lost: rows that were written without a part that the target does not have: strength, confidence, the rejected side.
    """

    out: str
    target: str
    formats: dict[str, str]
    num_written: int
    left_out: dict[str, int]
    rows: list[Excluded] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where every row was written, else 1."""
        return 1 if self.left_out else 0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "out": self.out,
            "format": self.target,
            "formats": self.formats,
            "num_written": self.num_written,
            "left_out": self.left_out,
            "lost": self.lost,
            "rows": [row.to_dict() for row in self.rows],
        }

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [f"{file}: format {name}" for file, name in self.formats.items()]
        lines.append(f"{self.num_written} rows written as {self.target} to {self.out}")
        if self.left_out:
            lines.append("not written: " + ", ".join(f"{reason} {count}" for reason, count in sorted(self.left_out.items())))
        if self.lost:
            lines.append("written without: " + ", ".join(f"{part} {count}" for part, count in sorted(self.lost.items())))
        return lines


@dataclass(frozen=True, slots=True)
class HowToRead:
    """What is said of the files beside their names."""

    format: str | None = None
    style: Literal["chat", "text"] | None = None
    columns: str | None = None
    labels: str | None = None
    rankings: Literal["best_worst", "all", "adjacent"] = "best_worst"


def convert(files: Sequence[str], target: str, out: Path, how: HowToRead) -> Converted:
    """Read files in any known format and write their examples in another.

    A pair becomes two rows of a format of unpaired completions; a ranking becomes pairs by ``how.rankings``, except where the
    target holds rankings.

    Raises
        UsageError: a format that is not written, an ending that is not, or a file that would be written over itself.
        InputError: a file that cannot be read, or no row that can be written.
    """
    from preftune.data.columns import parse_columns
    from preftune.data.formats.base import CannotHold, WritableFormat, formats, writable_formats
    from preftune.data.pipeline import Reader
    from preftune.data.sinks import sink_suffix, write_rows

    known = writable_formats()
    if target not in known:
        from preftune.core.registry import suggest

        raise UsageError(f"--to {target}: no format of that name is written: {suggest(target, known)}")
    is_stdout = str(out) == "-"
    if not is_stdout:
        sink_suffix(out)
    if any(out.exists() and Path(one).exists() and out.samefile(one) for one in files):
        raise UsageError(f"{out} is read and would be written over; name another file with --out")
    writer = formats.build(target)
    assert isinstance(writer, WritableFormat)
    bad: list[Excluded] = []
    counts: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    reader = Reader(
        files, format=how.format, style=how.style, columns=parse_columns(how.columns, how.labels), on_excluded=bad.append
    )

    def rows() -> Iterator[Mapping[str, Any]]:
        for example in reader:
            for one in _parts(example, target, how.rankings):
                try:
                    row = writer.write(one)
                    lost.update(_lost(one, target))
                    yield row
                except CannotHold as cannot:
                    where = example.provenance
                    counts[f"cannot_hold/{cannot.reason}"] += 1
                    if len(bad) < MAX_REPORTED:
                        bad.append(Excluded(where.file, where.line, f"cannot_hold/{cannot.reason}", cannot.detail))

    if is_stdout:
        import json

        written = 0
        for written, row in enumerate(rows(), 1):  # noqa: B007 -- the number of the last row is the count
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        written = write_rows(out, rows())
    counts.update({reason: count for reason, count in reader.counts.items() if reason not in {"rows", "kept"}})
    return Converted(str(out), target, reader.formats, written, dict(counts), bad[:MAX_REPORTED], dict(lost))


def _lost(example: Any, target: str) -> list[str]:
    """What a row does not say any more in a target."""
    from preftune.core.records import Preference

    judgement = example.judgement
    if not isinstance(judgement, Preference):
        return []
    lost = [] if target in {"comparison", "trl-preference"} else [
        name for name in ("strength", "confidence") if getattr(judgement, name)
    ]  # fmt: skip
    return [*lost, "rejected"] if target in {"messages", "prompt-completion"} else lost


def _parts(example: Any, target: str, rankings: str) -> list[Any]:
    """The examples that a target takes instead of one: two labelled completions of a pair, the pairs of a ranking."""
    from dataclasses import replace

    from preftune.core.records import Desirability, Preference, Ranking, expand_ranking, pairs_of_example, unpaired_of

    if isinstance(example.judgement, Ranking) and target != "ranking":
        parts = expand_ranking(example, rankings)
        if rankings == "best_worst":
            pairs = pairs_of_example(example)
            parts = [replace(example, completions=(pair.chosen, pair.rejected), judgement=Preference("first")) for pair in pairs]
    else:
        parts = [example]
    if target != "trl-unpaired":
        return parts or [example]
    found = [
        replace(part, completions=(completion,), judgement=Desirability(label))
        for part in parts
        for completion, label in unpaired_of(part)
    ]
    return found or [example]
