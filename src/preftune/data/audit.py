"""What can be said of pairs without a model: lengths, duplicates, and whether length alone gives the label away."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from preftune.core.ids import digest_bytes
from preftune.core.records import Demonstration, Example, pair_of, text_of
from preftune.data.minhash import normalise

Band: TypeAlias = Literal["green", "amber", "red"]

AMBER = (0.42, 0.58)
RED = (0.35, 0.65)


class Audit:
    """Collects what a report needs of each example: a few numbers, never the text. Lengths are in characters."""

    def __init__(self) -> None:
        self._prompt = array("q")
        self._chosen = array("q")
        self._rejected = array("q")
        self._demonstration = array("q")
        self._prompts: Counter[int] = Counter()
        self._kinds: Counter[str] = Counter()
        self._styles: Counter[str] = Counter()
        self._num_multi_turn = 0

    def add(self, example: Example) -> None:
        """Take one example in."""
        text = example.prompt_text
        self._prompt.append(len(text))
        self._prompts[int(digest_bytes(normalise(text).encode("utf-8", "surrogatepass"))[:16], 16)] += 1
        self._styles[example.style] += 1
        self._num_multi_turn += sum(message.role == "user" for message in example.prompt) > 1
        pair = pair_of(example)
        if pair is not None:
            self._kinds["pairs"] += 1
            self._chosen.append(len(text_of(pair.chosen)))
            self._rejected.append(len(text_of(pair.rejected)))
        elif isinstance(example.judgement, Demonstration) and example.completions:
            self._kinds["demonstrations"] += 1
            self._demonstration.append(len(text_of(example.completions[0])))
        else:
            self._kinds["others"] += 1

    def report(self) -> dict[str, Any]:
        """A plain mapping for reports and ``check --json``."""
        report: dict[str, Any] = {
            "examples": len(self._prompt),
            **{kind: self._kinds[kind] for kind in ("pairs", "demonstrations", "others") if self._kinds[kind]},
            "styles": dict(self._styles),
            "prompts": len(self._prompts),
            "rows_with_repeated_prompt": len(self._prompt) - len(self._prompts),
            "multi_turn": self._num_multi_turn,
            "characters": {
                name: lengths(values)
                for name, values in (
                    ("prompt", self._prompt),
                    ("chosen", self._chosen),
                    ("rejected", self._rejected),
                    ("demonstration", self._demonstration),
                )
                if values
            },
        }
        if self._chosen:
            auc = length_auc(self._chosen, self._rejected)
            report["length_bias"] = {
                "share_chosen_longer": share_longer(self._chosen, self._rejected),
                "auc": auc,
                "band": band_of(auc),
            }
        return report


def audit(examples: Iterable[Example]) -> dict[str, Any]:
    """The report on some examples."""
    collected = Audit()
    for example in examples:
        collected.add(example)
    return collected.report()


def lengths(values: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum.

    >>> lengths([1, 2, 3, 10])
    {'mean': 4.0, 'median': 2.5, 'p95': 8.95, 'max': 10.0}
    """
    numbers = np.asarray(values, dtype=np.float64)
    return {
        "mean": round(float(numbers.mean()), 2),
        "median": float(np.median(numbers)),
        "p95": round(float(np.quantile(numbers, 0.95)), 2),
        "max": float(numbers.max()),
    }


def share_longer(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    """Share of pairs whose chosen completion is the longer one; equal lengths count one half.

    >>> share_longer([2, 1, 5], [1, 1, 9])
    0.5
    """
    difference = np.asarray(chosen, dtype=np.int64) - np.asarray(rejected, dtype=np.int64)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def length_auc(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    r"""Area under the curve of a classifier that sees only the length difference of two completions in random order.

    With d the differences (chosen - rejected), the scores of the class "first is chosen" are d and those of the other
    class -d, so that AUC = P(d_i > -d_j) + P(d_i = -d_j) / 2 over all i, j. One half: length says nothing.

    >>> length_auc([2, 3], [1, 1]), length_auc([1, 2], [2, 1])
    (1.0, 0.5)
    """
    difference: npt.NDArray[np.int64] = np.asarray(chosen, dtype=np.int64) - np.asarray(rejected, dtype=np.int64)
    negative = np.sort(-difference)
    below = np.searchsorted(negative, difference, side="left")
    not_above = np.searchsorted(negative, difference, side="right")
    return float((below + not_above).sum() / 2 / len(difference) ** 2)


def band_of(auc: float) -> Band:
    """Green within .42 to .58, red outside .35 to .65, amber between.

    >>> band_of(0.5), band_of(0.6), band_of(0.2)
    ('green', 'amber', 'red')
    """
    if RED[0] <= auc <= RED[1]:
        return "green" if AMBER[0] <= auc <= AMBER[1] else "amber"
    return "red"
