"""Labels from a judge: which of two completions is better, for rows that do not say it yet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preftune.app.context import Context
from preftune.core.errors import BadRow, InputError, PreftuneError, UsageError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.files import write_text
from preftune.core.records import Example, Messages, Preference, Provenance

if TYPE_CHECKING:
    from preftune.judging.base import Candidate, Verdict

SIDES = ("prompt", "first", "second")


@dataclass(frozen=True, slots=True)
class Labelled:
    """What was labelled: rows by label, those left out by reason, and the judge's account."""

    out: str
    judge: str
    labels: dict[str, int]
    kept: int
    left_out: dict[str, int]
    consistency: float
    judge_counts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    def summary(self) -> list[str]:
        """What a person reads."""
        from preftune.evaluation.report import counts_sentence

        labels = ", ".join(f"{label} {count}" for label, count in self.labels.items())
        lines = [f"{sum(self.labels.values())} rows labelled by {self.judge}: {labels}; {self.kept} kept as they were labelled"]
        lines.append(f"both orders name the same winner in {self.consistency:.1%}")
        if self.left_out:
            lines.append("left out: " + ", ".join(f"{reason} {count}" for reason, count in self.left_out.items()))
        if self.judge_counts:
            lines.append(counts_sentence(self.judge_counts))
        return [*lines, f"comparisons {self.out}"]


def label_file(
    file: Path,
    judge: str | Mapping[str, Any],
    out: Path,
    *,
    relabel: bool = False,
    sink: EventSink = ignore,
    context: Context | None = None,
) -> Labelled:
    """Ask a judge about every row without a label, in both orders, and write all rows as format ``comparison``.

    The score of a row is the mean of both orders; one half is a tie. ``confidence`` of a label is that mean on its own
    side: what the judge says, not a calibrated probability. Judgements of an ``llm`` judge are kept, so the same command
    goes on after a kill.

    Parameters
        file: rows {prompt, first, second} without ``label``; with ``relabel`` any format of pairs, whose labels are replaced.

    Raises
        UsageError: ``out`` is ``file``, or every row has a label and ``relabel`` is not said.
        PreftuneError: the judge gave no verdict of any row.
    """
    from preftune.data.formats.comparison import Comparison
    from preftune.judging.base import counts_of, judge_all, names_of, prepared_judge

    if out.expanduser().resolve() == file.expanduser().resolve():
        raise UsageError(f"{out}: it is the file that is read; name another one with --out")
    left_out: Counter[str] = Counter()
    rows = _read(file, relabel=relabel, left_out=left_out)
    asked = [example for example, is_labelled in rows if not is_labelled]
    if not asked:
        raise UsageError(f"{file}: no row is without a label; --relabel replaces the labels")
    made = prepared_judge(judge, Path.cwd(), (context or Context.from_environment()).cache)
    requests = []
    for one in asked:
        first, second = (_candidate(side) for side in one.completions)
        requests += [(one.prompt, first, second), (one.prompt, second, first)]
    verdicts = judge_all(made, requests, lambda done, total: sink(Progress("judging", done, total)))
    pairs = iter(zip(verdicts[::2], verdicts[1::2], strict=True))
    lines: list[str] = []
    labels, agreed = Counter(first=0, second=0, tie=0), 0
    for example, is_labelled in rows:
        row = Comparison().write(example)
        said: dict[str, Any] = {"judges": list(example.provenance.judges)} if example.provenance.judges else {}
        if not is_labelled:
            forward, backward = next(pairs)
            if forward is None or backward is None:
                left_out["no_verdict"] += 1
                continue
            agreed += forward.label == {"first": "second", "second": "first", "tie": "tie"}[backward.label]
            preference = _preference(forward, backward)
            labels[preference.preferred] += 1
            row = Comparison().write(replace(example, judgement=preference))
            said = {"judges": names_of(made), "scores": [forward.score, backward.score]}
        lines.append(json.dumps({**row, **said}, ensure_ascii=False) + "\n")
    total = sum(labels.values())
    if not total:
        raise PreftuneError(f"the judge gave no verdict of any of {len(asked)} rows: {counts_of(made)}")
    write_text(out, "".join(lines))
    name = str(made.describe().get("label", ""))
    return Labelled(str(out), name, dict(labels), len(rows) - len(asked), dict(left_out), agreed / total, counts_of(made))


def _read(file: Path, *, relabel: bool, left_out: Counter[str]) -> list[tuple[Example, bool]]:
    """Every comparison of a file, and whether its label stays."""
    from preftune.data.formats.comparison import Comparison
    from preftune.data.pipeline import read_examples
    from preftune.data.sources.base import UnreadableRow, source_for

    _, source = source_for(file)
    try:
        rows = [(number, row) for number, row in source.rows(file)]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    if not any(not isinstance(row, UnreadableRow) and all(name in row for name in SIDES) for _, row in rows):
        read = read_examples([str(file)])
        left_out.update(one.reason for one in read.excluded)
        found = [(one, not relabel) for one in read.examples if isinstance(one.judgement, Preference)]
        left_out.update({"no_comparison": len(read.examples) - len(found)} if len(found) < len(read.examples) else {})
        return found
    kept: list[tuple[Example, bool]] = []
    for number, row in rows:
        try:
            if isinstance(row, UnreadableRow):
                raise BadRow("unreadable", "no row")
            is_labelled = row.get("label") is not None and not relabel
            judges = tuple(one for one in row.get("judges") or () if isinstance(one, str))
            provenance = Provenance(str(file), number, (), (), judges)
            kept.append((Comparison().read(row if is_labelled else {**row, "label": "tie"}, provenance), is_labelled))
        except BadRow as bad:
            left_out[bad.reason] += 1
    return kept


def _preference(forward: Verdict, backward: Verdict) -> Preference:
    score = (forward.score + 1.0 - backward.score) / 2
    if score == 0.5:
        return Preference("tie")
    label: Literal["first", "second"] = "first" if score > 0.5 else "second"
    return Preference(label, confidence=max(score, 1.0 - score))


def _candidate(messages: Messages) -> Candidate:
    from preftune.judging.base import Candidate

    text = "\n\n".join(one.content for one in messages if one.role == "assistant")
    return Candidate(text, len(text.split()), True)
