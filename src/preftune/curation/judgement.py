"""Scores of the samples of one prompt, by a judge that scores one text or compares two."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from preftune.core.errors import PreftuneError
from preftune.core.records import Messages
from preftune.judging.base import Candidate, Judge, ManyJudge, judge_all


@runtime_checkable
class PointwiseJudge(Protocol):
    """A judge that can score one completion by itself."""

    def score(self, prompt: Messages, candidate: Candidate) -> float:
        """Higher is better."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One call of a judge: the score of ``first`` alone (``second`` None), or of ``first`` shown before ``second``."""

    first: int
    second: int | None
    score: float


Known = dict[tuple[int, int | None], Judgement]
Comparisons = Literal["all", "knockout"]


def tie_margin_of(judge: Judge) -> float:
    """Differences of scores that the judge itself calls a tie, in points; 0 where it compares or says nothing."""
    return float(getattr(judge, "tie_margin", 0.0)) if isinstance(judge, PointwiseJudge) else 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """The samples of one prompt, what is known of them, and who takes what becomes known."""

    prompt: Messages
    samples: Sequence[Candidate]
    known: Known
    record: Callable[[Judgement], None]


def ask_ahead(judge: Judge, cases: Sequence[Case], comparisons: Comparisons) -> None:
    """Ask for every comparison of several prompts at once, where the judge can answer many and which are needed is known before.

    Comparisons without a verdict stay unknown: ``score_samples`` meets them again.
    """
    if not isinstance(judge, ManyJudge) or isinstance(judge, PointwiseJudge) or comparisons != "all":
        return
    wanted = [
        (case, pair) for case in cases for pair in itertools.permutations(range(len(case.samples)), 2) if pair not in case.known
    ]
    verdicts = judge_all(judge, [(case.prompt, case.samples[one], case.samples[other]) for case, (one, other) in wanted])
    for (case, (one, other)), verdict in zip(wanted, verdicts, strict=True):
        if verdict is not None:
            made = Judgement(one, other, verdict.score)
            case.record(made)
            case.known[one, other] = made


def score_samples(
    judge: Judge,
    prompt: Messages,
    samples: Sequence[Candidate],
    comparisons: Comparisons,
    known: Known,
    record: Callable[[Judgement], None],
) -> list[float]:
    """The score of every sample of a prompt.

    A judge that scores one text is asked once a sample. A judge that compares two is asked in both orders for every
    pair (``all``), and a sample's score is its mean over opponents, in [0, 1]; or in a ``knockout``, where it says how far the
    sample came: K - 1 matches instead of K (K - 1) / 2, and samples that never met are told apart by that alone.

    Parameters
        known: judgements that were made already; they are not made again.
        record: takes each new judgement as soon as it is there.

    Raises
        NoVerdict: the judge was asked and said nothing that can be used.
        PreftuneError: a comparison whose score is outside [0, 1].
    """

    def ask(first: int, second: int | None) -> float:
        if (first, second) not in known:
            made = Judgement(first, second, _ask(judge, prompt, samples[first], None if second is None else samples[second]))
            record(made)
            known[first, second] = made
        return known[first, second].score

    if isinstance(judge, PointwiseJudge):
        return [ask(number, None) for number in range(len(samples))]

    def duel(one: int, other: int) -> float:
        return (ask(one, other) + 1.0 - ask(other, one)) / 2

    totals = [0.0] * len(samples)
    if comparisons == "all":
        for one, other in itertools.combinations(range(len(samples)), 2):
            won = duel(one, other)
            totals[one] += won
            totals[other] += 1.0 - won
        return [total / max(1, len(samples) - 1) for total in totals]
    return _knockout(len(samples), duel)


def _knockout(count: int, duel: Callable[[int, int], float]) -> list[float]:
    """Rounds survived, plus the share of the match that was lost, over the number of rounds: 1 for the winner.

    Neighbours meet; where neither is better the first goes on, and so does the odd one out.
    """
    reached = [0.0] * count
    alive, done = list(range(count)), 0
    while len(alive) > 1:
        winners: list[int] = []
        for place in range(0, len(alive) - 1, 2):
            one, other = alive[place], alive[place + 1]
            share = duel(one, other)
            winner, loser = (one, other) if share >= 0.5 else (other, one)
            reached[loser] = done + min(share, 1.0 - share)
            winners.append(winner)
        alive = [*winners, *alive[len(alive) - len(alive) % 2 :]]
        done += 1
    reached[alive[0]] = float(done)
    return [one / max(1, done) for one in reached]


def _ask(judge: Judge, prompt: Messages, first: Candidate, second: Candidate | None) -> float:
    if second is None:
        assert isinstance(judge, PointwiseJudge)
        return float(judge.score(prompt, first))
    verdict = judge(prompt, first, second)
    if not 0.0 <= verdict.score <= 1.0:
        raise PreftuneError(f"judge {judge.describe().get('name')!r} gave the score {verdict.score}; it must lie in [0, 1]")
    return verdict.score
