"""The ledger: what the policy thought of every pair just before it trained on it.

    evidence = margin of the pair before its own update - mean margin of its step

A pair whose margin is far below that of its neighbours goes against what the other pairs teach: it may be mislabelled.
One line a step in ``ledger.jsonl``; a first line names the files, then ``{"step", "mean", "pairs": [[file, line, id, margin]]}``.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preftune.core.errors import PreftuneError
from preftune.core.files import append_jsonl, read_jsonl, write_text
from preftune.core.records import TokenisedExample

WINDOW = 256  # pairs that the correlation with length looks at
ID_LETTERS = 12
FEWEST = 64


class Ledger:
    """Margins as they come, on the disk step by step.

    Parameters
        path: the file; None keeps nothing, as every rank but the first does. examples: of the stage.
        step: where the stage stands; later lines of a killed process are dropped.
    """

    def __init__(self, path: Path | None, examples: Sequence[TokenisedExample], step: int = 0) -> None:
        self.path = path
        self._files = {file: index for index, file in enumerate(sorted({one.provenance.file for one in examples}))}
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        rows = [row for row in read_jsonl(path) if int(row["step"]) <= step] if step and path is not None else []
        if path is not None and path.exists():
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if rows:
            self._remember(rows, examples)

    def add(self, step: int, examples: Sequence[TokenisedExample], margins: Sequence[float]) -> None:
        """Append the pairs of one step.

        Raises
            PreftuneError: the disk is full or the file cannot be written.
        """
        if not margins or self.path is None:
            return
        try:
            if not self.path.exists() or self.path.stat().st_size == 0:
                append_jsonl(self.path, {"step": 0, "files": list(self._files)})
            pairs = [
                [self._files[one.provenance.file], one.provenance.line, one.example_id[:ID_LETTERS], float(f"{margin:.5g}")]
                for one, margin in zip(examples, margins, strict=True)
            ]
            append_jsonl(self.path, {"step": step, "mean": float(np.mean(margins)), "pairs": pairs})
        except OSError as error:
            raise PreftuneError(
                f"ledger of step {step} cannot be written to {self.path}: {error.strerror}; free some space and resume"
            ) from error
        self._recent.extend((margin, _length_difference(one)) for margin, one in zip(margins, examples, strict=True))

    def length_correlation(self) -> float | None:
        """Spearman's correlation of margin and difference of lengths over the last pairs; None where it is undefined."""
        if len(self._recent) < FEWEST:
            return None
        from scipy import stats  # a second to import, and only a probe asks

        margins, differences = np.array(self._recent).T
        if np.ptp(margins) == 0 or np.ptp(differences) == 0:
            return None
        return float(stats.spearmanr(margins, differences).statistic)

    def _remember(self, rows: Sequence[Mapping[str, Any]], examples: Sequence[TokenisedExample]) -> None:
        lengths = {one.example_id[:ID_LETTERS]: _length_difference(one) for one in examples}
        for row in rows:
            self._recent.extend((pair[3], lengths[pair[2]]) for pair in row.get("pairs", ()))


@dataclass(frozen=True, slots=True)
class Look:
    """What a ledger says of one pair, over all times that it was trained on.

    Parameters
        deviation: its margin minus the mean of its step, in standard deviations of that step; the mean over its looks.
        margins: before each of its own updates. means: of the steps they were in. steps: which.
    """

    file: str
    line: int
    example_id: str
    deviation: float
    margins: tuple[float, ...]
    means: tuple[float, ...]
    steps: tuple[int, ...]


def read_ledger(path: Path) -> list[Look]:
    """Every pair of a ledger, those that go most against the others first."""
    rows = read_jsonl(path)
    files: list[str] = []
    found: dict[tuple[str, int, str], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        if "files" in row:
            files = row["files"]
            continue
        spread = float(np.std([pair[3] for pair in row["pairs"]]))
        for file, line, example_id, margin in row["pairs"]:
            deviation = (margin - row["mean"]) / spread if spread > 0 else 0.0
            found.setdefault((files[file], line, example_id), []).append((row["step"], margin, row["mean"], deviation))
    looks = []
    for (file, line, example_id), seen in found.items():
        steps, margins, means, deviations = zip(*seen, strict=True)
        looks.append(Look(file, line, example_id, float(np.mean(deviations)), margins, means, steps))
    return sorted(looks, key=lambda look: look.deviation)


def _length_difference(example: TokenisedExample) -> int:
    chosen, rejected = example.completions
    return chosen.num_scored - rejected.num_scored
