"""The win rate: judges with a bias, units, verdicts, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from preftune.core.errors import PreftuneError
from preftune.core.records import Message, Messages
from preftune.evaluation.winrate import evaluate_pairs, hash_prompts, verdict_of
from preftune.judging.base import Candidate, Verdict
from preftune.statistics.intervals import Interval


@dataclass
class Rule:
    """A judge that is one function of the two texts, and remembers what it was shown."""

    decide: Callable[[str, str], float]
    seen: list[tuple[str, str]] = field(default_factory=list)

    identity = "test"

    def describe(self) -> dict[str, Any]:
        return {"name": "test", "identity": self.identity}

    def __call__(self, prompt: Messages, first: Candidate, second: Candidate) -> Verdict:
        self.seen.append((first.text, second.text))
        score = self.decide(first.text, second.text)
        return Verdict(score, "first" if score > 0.5 else "second" if score < 0.5 else "tie")


def prompts(count: int) -> list[Messages]:
    return [(Message("user", f"prompt {index}"),) for index in range(count)]


def texts(*values: str) -> list[Candidate]:
    return [Candidate(value, len(value), True) for value in values]


LONGER = Rule(lambda first, second: float(np.sign(len(first) - len(second)) / 2 + 0.5))


def test_both_orders_are_judged() -> None:
    judge = Rule(lambda first, second: 1.0)
    evaluate_pairs(prompts(1), texts("policy"), texts("baseline"), judge)
    assert judge.seen == [("policy", "baseline"), ("baseline", "policy")]


def test_a_judge_of_position_finds_nothing() -> None:
    first = Rule(lambda first, second: 1.0)
    rate = evaluate_pairs(prompts(50), texts(*["a"] * 50), texts(*["b"] * 50), first)
    assert (rate.rate, rate.consistency, rate.ties) == (0.5, 0.0, 50)
    assert rate.interval.contains(0.5)
    assert first(prompts(1)[0], *texts("a", "b")).score == 1.0  # one order alone would say that the policy always wins


def test_a_judge_of_length_is_controlled_away() -> None:
    rng = np.random.default_rng(0)
    ours = texts(*["x" * int(size) for size in rng.integers(50, 150, 300)])
    theirs = texts(*["x" * int(size) for size in rng.integers(30, 130, 300)])
    rate = evaluate_pairs(prompts(300), ours, theirs, LONGER)
    assert rate.rate > 0.6
    assert rate.verdict == "better"
    assert rate.controlled.rate is not None
    assert rate.controlled.interval is not None
    assert rate.controlled.interval.contains(0.5)
    assert abs(rate.controlled.rate - 0.5) < 0.5 * abs(rate.rate - 0.5)
    assert rate.length_ratio == pytest.approx(1.25, abs=0.1)


def test_identical_systems_cover_one_half() -> None:
    rng = np.random.default_rng(1)
    both = texts(*["x" * int(size) for size in rng.integers(1, 99, 80)])
    rate = evaluate_pairs(prompts(80), both, both, LONGER)
    assert (rate.rate, rate.ties, rate.consistency, rate.p_value) == (0.5, 80, 1.0, 1.0)
    assert rate.interval.contains(0.5)
    assert rate.controlled.reason == "every prompt has the same result"
    assert rate.needed is None


def test_counts_by_hand() -> None:
    rate = evaluate_pairs(prompts(4), texts("aaa", "aa", "a", "aaaa"), texts("a", "aa", "aa", "b"), LONGER)
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert rate.rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert rate.tie_share == 0.25
    assert rate.length_ratio == pytest.approx(10 / 6)
    assert rate.policy.characters == 2.5
    assert [one.label for one in rate.judged] == ["win", "tie", "loss", "win"]


def test_an_inconsistent_win_counts_three_quarters() -> None:
    # the first order says policy, the second says tie
    judge = Rule(lambda first, second: 1.0 if first == "p" else 0.5)
    rate = evaluate_pairs(prompts(1), texts("p"), texts("b"), judge)
    assert (rate.rate, rate.wins, rate.consistency) == (0.75, 1, 0.0)


def test_the_prompt_is_the_unit() -> None:
    ours, theirs = ["aa", "a", "aa", "a"] * 20, ["a", "aa", "a", "a"] * 20
    once = evaluate_pairs(prompts(80), texts(*ours), texts(*theirs), LONGER)
    thrice = evaluate_pairs(prompts(80) * 3, texts(*ours * 3), texts(*theirs * 3), LONGER)
    assert (thrice.num_prompts, thrice.num_judged) == (80, 240)
    assert thrice.interval == once.interval
    assert thrice.detectable == once.detectable
    apart = evaluate_pairs(prompts(240), texts(*ours * 3), texts(*theirs * 3), LONGER)
    assert apart.interval.width < 0.7 * once.interval.width


def test_hash_of_a_prompt_set_ignores_order_and_repetition() -> None:
    some = prompts(3)
    assert hash_prompts(some) == hash_prompts([*reversed(some), some[0]])
    assert hash_prompts(some) != hash_prompts(prompts(4))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.46, 0.54, "equivalent"), (0.45, 0.55, "equivalent"), (0.51, 0.54, "equivalent"), (0.46, 0.49, "equivalent"),
        (0.51, 0.60, "better"), (0.40, 0.49, "worse"), (0.44, 0.54, "inconclusive"), (0.5, 0.6, "inconclusive"),
    ],
)  # fmt: skip
def test_equivalence_comes_first(low: float, high: float, expected: str) -> None:
    assert verdict_of(Interval(low, high, "wilson"), 0.05) == expected


def test_a_worse_model_is_called_worse() -> None:
    rate = evaluate_pairs(prompts(60), texts(*["a"] * 60), texts(*["aa"] * 60), LONGER)
    assert (rate.verdict, rate.rate) == ("worse", 0.0)
    assert rate.interval.low == 0.0


def test_nothing_to_judge_and_broken_judges_are_refused() -> None:
    with pytest.raises(PreftuneError, match="at least one"):
        evaluate_pairs([], [], [], LONGER)
    with pytest.raises(PreftuneError, match="2 prompts, 1 and 2"):
        evaluate_pairs(prompts(2), texts("a"), texts("a", "b"), LONGER)
    for score in (1.2, float("nan")):
        with pytest.raises(PreftuneError, match=r"must lie in \[0, 1\]"):
            evaluate_pairs(prompts(1), texts("a"), texts("b"), Rule(lambda first, second, score=score: score))


def test_progress_is_told_and_empty_baselines_have_no_ratio() -> None:
    told: list[tuple[int, int]] = []
    rate = evaluate_pairs(
        prompts(2), texts("a", "b"), texts("", ""), LONGER, on_progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # judgements, two a prompt
    assert rate.length_ratio is None
