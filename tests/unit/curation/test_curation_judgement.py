"""Scores from judges that score one text and from judges that compare two; nothing is asked twice."""

import itertools
from dataclasses import dataclass, field

import pytest

from preftune.core.errors import PreftuneError
from preftune.core.records import Message
from preftune.curation.judgement import score_samples
from preftune.judging.base import Candidate, Verdict

PROMPT = (Message("user", "q"),)
TEXTS = [Candidate(str(quality), 1, True) for quality in (3, 9, 1, 5, 7)]


@dataclass
class Comparing:
    """Prefers the larger number, and adds a bias to whatever is shown first."""

    bias: float = 0.0
    calls: list = field(default_factory=list)
    identity = "comparing"

    def describe(self):
        return {"name": "comparing"}

    def __call__(self, prompt, first, second):
        self.calls.append((first.text, second.text))
        score = min(1.0, 0.5 + 0.05 * (int(first.text) - int(second.text)) + self.bias)
        return Verdict(score, "first" if score > 0.5 else "second" if score < 0.5 else "tie")


@dataclass
class Scoring(Comparing):
    def score(self, prompt, candidate):
        self.calls.append(candidate.text)
        return float(candidate.text)


def scores(judge, comparisons="all", known=None, record=None):
    return score_samples(judge, PROMPT, TEXTS, comparisons, {} if known is None else known, record or (lambda made: None))


def test_a_judge_that_scores_is_asked_once_a_sample():
    judge = Scoring()
    assert scores(judge) == [3, 9, 1, 5, 7]
    assert judge.calls == ["3", "9", "1", "5", "7"]


def test_every_pair_is_compared_in_both_orders_and_position_bias_cancels():
    judge = Comparing(bias=0.05)
    numbers = [int(one.text) for one in TEXTS]
    expected = [sum(0.5 + 0.05 * (one - other) for other in numbers if other != one) / 4 for one in numbers]
    assert scores(judge) == pytest.approx(expected)
    assert sorted(judge.calls) == sorted(itertools.permutations([one.text for one in TEXTS], 2))


def test_a_knockout_finds_the_best_with_fewer_comparisons():
    judge = Comparing()
    found = scores(judge, "knockout")
    assert max(range(5), key=lambda at: found[at]) == 1
    assert len(judge.calls) == 2 * 4, "K - 1 matches, both orders"
    assert all(0 <= one <= 1 for one in found)


@pytest.mark.parametrize("comparisons", ["all", "knockout"])
@pytest.mark.parametrize("kind", [Comparing, Scoring])
def test_what_is_known_is_not_asked_again(kind, comparisons):
    log = []
    whole = scores(kind(), comparisons, record=log.append)
    for kept in range(len(log) + 1):
        again = kind()
        known = {(one.first, one.second): one for one in log[:kept]}
        more = []
        assert scores(again, comparisons, known, more.append) == whole
        assert log[:kept] + more == log
        assert len(again.calls) == len(log) - kept


def test_a_comparison_outside_its_range_stops():
    with pytest.raises(PreftuneError, match=r"\[0, 1\]"):
        scores(Comparing(bias=-0.8))
