"""The comparison of rounds: who is compared with whom, and the gain against an independent computation."""

import numpy as np
import pytest

from preftune.core.records import Message
from preftune.evaluation.rounds import compare
from preftune.evaluation.winrate import evaluate_pairs
from preftune.judging.base import Candidate, Verdict

PROMPTS = [(Message("user", f"prompt {number}"),) for number in range(120)]


class Larger:
    """Prefers the larger number; equal ones are a tie."""

    identity = "larger"

    def describe(self):
        return {"name": "larger", "label": "larger"}

    def __call__(self, prompt, first, second):
        one, other = int(first.text), int(second.text)
        return Verdict(0.5, "tie") if one == other else Verdict(1.0, "first") if one > other else Verdict(0.0, "second")


def answers(low, high, seed):
    return [Candidate(str(one), 1, True) for one in np.random.default_rng(seed).integers(low, high, len(PROMPTS))]


START, FIRST, SECOND = answers(0, 10, 1), answers(1, 11, 2), answers(4, 14, 3)


def rate(one, other):
    return evaluate_pairs(PROMPTS, one, other, Larger())


def results(first, second):
    return compare([("dpo-r1", rate(first, START), rate(first, START)), ("dpo-r2", rate(second, START), rate(second, first))])


def test_the_gain_is_the_paired_difference_of_the_win_rates():
    one, two = results(FIRST, SECOND)
    assert (one.gain, one.interval) == (None, None)
    assert two.gain == pytest.approx(two.against_start.rate - one.against_start.rate)
    assert two.interval.low < two.gain < two.interval.high

    def won(ours):
        return np.array([np.sign(int(a.text) - int(b.text)) / 2 + 0.5 for a, b in zip(ours, START, strict=True)])

    differences = won(SECOND) - won(FIRST)
    rng = np.random.default_rng(0)
    boot = [rng.choice(differences, len(differences)).mean() for _ in range(4000)]
    assert two.interval.low == pytest.approx(np.quantile(boot, 0.025), abs=0.03)
    assert two.interval.high == pytest.approx(np.quantile(boot, 0.975), abs=0.03)
    assert two.p_value < 0.01


def test_the_sentence_says_whether_the_round_raised_the_rate():
    one, two = results(FIRST, SECOND)
    assert two.sentence.startswith("Round 2 raises the win rate: its model wins")
    assert "against round 1" in two.sentence
    assert "points" in two.sentence
    assert one.sentence.startswith("Round 1 ")
    assert results(SECOND, FIRST)[1].sentence.startswith("Round 2 lowers the win rate")
    same = results(FIRST, FIRST)[1]
    assert same.sentence.startswith("Round 2 does not show a higher win rate")
    assert same.gain == 0
