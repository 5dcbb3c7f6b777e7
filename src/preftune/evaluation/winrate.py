"""Which of two models writes the better completions: every prompt judged in both orders, the prompt as the unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from preftune.core.errors import PreftuneError
from preftune.core.ids import digest_json
from preftune.core.records import Messages
from preftune.judging.base import Candidate, Judge, Verdict, counts_of, judge_all
from preftune.statistics.intervals import Interval, mean_by_cluster, mean_interval
from preftune.statistics.judge_bias import JudgeBias, judge_bias
from preftune.statistics.length_control import LengthControl, length_control
from preftune.statistics.paired import sign_test
from preftune.statistics.power import detectable_effect, prompts_needed

Outcome: TypeAlias = Literal["better", "worse", "equivalent", "inconclusive"]
MAX_MISSING = 0.1  # share of pairs without a judgement beyond which there is no verdict: they may be no random part
MAX_NEEDED = 1_000_000  # beyond this many prompts, "more prompts" is no advice


class Completion(Protocol):
    """What a model wrote: a generation, or anything with the same three facts."""

    @property
    def text(self) -> str:
        """The assistant's text."""

    @property
    def num_tokens(self) -> int:
        """Tokens of it."""

    @property
    def is_complete(self) -> bool:
        """It ended by itself."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt, both completions and what the judge said of them in each order.

    score: in [0, 1], 1 = the policy wins; the mean of both orders. is_consistent: both orders name the same winner.
    """

    prompt: Messages
    policy: Candidate
    baseline: Candidate
    score: float
    is_consistent: bool
    forward: Verdict
    backward: Verdict

    @property
    def label(self) -> Literal["win", "tie", "loss"]:
        """The policy's result on this prompt."""
        return "win" if self.score > 0.5 else "loss" if self.score < 0.5 else "tie"


@dataclass(frozen=True, slots=True)
class Side:
    """The texts of one model in figures: mean characters and tokens, and the share that ended by itself."""

    characters: float
    tokens: float
    complete: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often the policy's completion beats the baseline's, a tie being one half.

    Parameters
        judge: what the judge says of itself.
        num_prompts: distinct prompts, the unit of every figure here. num_judged: pairs of completions.
        wins, ties, losses: prompts by their mean score over orders and completions.
        rate, interval: mean score over prompts, and its 95 % interval.
        controlled: the rate at equal length, or why there is none.
        length_ratio: mean characters, policy / baseline; None where the baseline wrote nothing.
        consistency: share of judged pairs whose winner is the same in both orders.
        bias: what the judge prefers apart from quality.
        num_missing: pairs that the judge gave no verdict of in one order or both; they are in no figure.
        judge_counts: the judge's account of calls, retries and failures; empty where it keeps none.
        detectable: the smallest |rate - 1/2| that so many prompts show with 80 % power. needed: prompts that would show the
            difference seen; None where it is none.
        p_value: exact two-sided sign test on wins against losses.
        margin: half-width around one half within which models count as equivalent.
        verdict: equivalence first, then better or worse, else inconclusive.
        judged: every prompt, for the report's texts.
    """

    judge: dict[str, Any]
    num_prompts: int
    num_judged: int
    wins: int
    ties: int
    losses: int
    rate: float
    interval: Interval
    controlled: LengthControl
    length_ratio: float | None
    policy: Side
    baseline: Side
    consistency: float
    detectable: float
    needed: int | None
    p_value: float
    prompts_hash: str
    margin: float
    verdict: Outcome
    judged: tuple[Judged, ...]
    bias: JudgeBias
    num_missing: int
    judge_counts: dict[str, Any]

    @property
    def missing_share(self) -> float:
        """Pairs without a judgement / pairs."""
        return self.num_missing / (self.num_judged + self.num_missing)

    @property
    def lacks_judgements(self) -> bool:
        """More than 10 % of the pairs have no judgement: then the verdict is inconclusive."""
        return self.missing_share > MAX_MISSING

    @property
    def tie_share(self) -> float:
        """Ties / prompts."""
        return self.ties / self.num_prompts

    @property
    def judge_label(self) -> str:
        """The judge in a few words."""
        return str(self.judge.get("label") or self.judge.get("title") or self.judge.get("name", "unnamed"))

    def to_dict(self) -> dict[str, Any]:
        """Every figure in JSON values; the texts are left to the report's samples and ``completions.jsonl``."""
        row = {name: getattr(self, name) for name in _FIGURES}
        return {
            **row,
            "tie_share": self.tie_share,
            "missing_share": self.missing_share,
            "judge_bias": asdict(self.bias),
            "judge": self.judge,
            "interval": asdict(self.interval),
            "controlled": asdict(self.controlled),
            "policy": asdict(self.policy),
            "baseline": asdict(self.baseline),
        }


_FIGURES = (
    "verdict", "rate", "num_prompts", "num_judged", "wins", "ties", "losses", "length_ratio", "consistency", "detectable",
    "needed", "p_value", "prompts_hash", "margin", "num_missing", "judge_counts",
)  # fmt: skip


def evaluate_pairs(
    prompts: Sequence[Messages],
    policy: Sequence[Completion],
    baseline: Sequence[Completion],
    judge: Judge,
    *,
    margin: float = 0.05,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> WinRate:
    """Judge every prompt in both orders and count.

    Parameters
        prompts, policy, baseline: aligned; a prompt that comes several times is averaged into one unit.
        margin: half-width of equivalence, in (0, 0.5).
        seed: of the bootstrap. on_progress: takes judgements made and wanted.

    Raises
        PreftuneError: nothing to judge, no verdict at all, lists of different sizes, or a judge whose score is outside [0, 1].
    """
    if not len(prompts) == len(policy) == len(baseline) or not prompts:
        raise PreftuneError(
            f"a win rate needs a completion of both models for every prompt and at least one, got {len(prompts)} prompts, "
            f"{len(policy)} and {len(baseline)} completions"
        )
    judged = _judge_both_orders(judge, prompts, policy, baseline, on_progress)
    num_missing = len(prompts) - len(judged)
    if not judged:
        raise PreftuneError(f"the judge gave no verdict of any of {len(prompts)} prompts: {_words(counts_of(judge))}")
    keys = [prompt_key(one.prompt) for one in judged]
    scores = mean_by_cluster([one.score for one in judged], keys)
    lengths = mean_by_cluster([len(one.policy.text) - len(one.baseline.text) for one in judged], keys)
    count = len(scores)
    wins, losses = int((scores > 0.5).sum()), int((scores < 0.5).sum())
    interval = mean_interval(scores, seed=seed)
    rate = float(scores.mean())
    ours, theirs = _side([one.policy for one in judged]), _side([one.baseline for one in judged])
    # All ties leave no spread to plan with; then at least one prompt is taken to be decisive.
    tie_share = min((count - wins - losses) / count, 1 - 1 / count)
    verdict = "inconclusive" if num_missing > MAX_MISSING * len(prompts) else verdict_of(interval, margin)
    return WinRate(
        judge=judge.describe(),
        num_prompts=count,
        num_judged=len(judged),
        wins=wins,
        ties=count - wins - losses,
        losses=losses,
        rate=rate,
        interval=interval,
        controlled=length_control(scores, lengths, seed=seed),
        length_ratio=ours.characters / theirs.characters if theirs.characters else None,
        policy=ours,
        baseline=theirs,
        consistency=float(np.mean([one.is_consistent for one in judged])),
        detectable=detectable_effect(count, tie_share=tie_share),
        needed=_needed(abs(rate - 0.5), tie_share),
        p_value=sign_test(wins, losses),
        prompts_hash=hash_prompts(prompts),
        margin=margin,
        verdict=verdict,
        judged=tuple(judged),
        bias=judge_bias(
            [one.forward.score for one in judged],
            [one.backward.score for one in judged],
            [len(one.policy.text) - len(one.baseline.text) for one in judged],
            keys,
            seed,
        ),
        num_missing=num_missing,
        judge_counts=counts_of(judge),
    )


def verdict_of(interval: Interval, margin: float) -> Outcome:
    """Equivalence first: an interval inside 1/2 +- margin; then better or worse: one that leaves 1/2 out.

    >>> verdict_of(Interval(0.51, 0.54, "wilson"), 0.05)
    'equivalent'
    >>> verdict_of(Interval(0.51, 0.60, "wilson"), 0.05)
    'better'
    """
    if 0.5 - margin <= interval.low and interval.high <= 0.5 + margin:
        return "equivalent"
    if interval.low > 0.5:
        return "better"
    return "worse" if interval.high < 0.5 else "inconclusive"


def prompt_key(prompt: Messages) -> str:
    """The content of a prompt as a digest: equal prompts are one unit."""
    return digest_json([message.to_dict() for message in prompt])


def hash_prompts(prompts: Sequence[Messages]) -> str:
    """Digest of a set of prompts; neither order nor repetition counts."""
    return digest_json(sorted({prompt_key(prompt) for prompt in prompts}))


def _judge_both_orders(
    judge: Judge,
    prompts: Sequence[Messages],
    policy: Sequence[Completion],
    baseline: Sequence[Completion],
    on_progress: Callable[[int, int], None] | None,
) -> list[Judged]:
    """What the judge said of every pair in both orders; a pair without both verdicts is left out."""
    pairs = [(p, _candidate(one), _candidate(other)) for p, one, other in zip(prompts, policy, baseline, strict=True)]
    requests = [request for p, one, other in pairs for request in ((p, one, other), (p, other, one))]
    verdicts = judge_all(judge, requests, on_progress)
    judged: list[Judged] = []
    for (prompt, one, other), forward, backward in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
        if forward is not None and backward is not None:
            mirrored = {"first": "second", "second": "first", "tie": "tie"}[backward.label]
            score = (forward.score + 1.0 - backward.score) / 2
            judged.append(Judged(prompt, one, other, score, forward.label == mirrored, forward, backward))
    return judged


def _words(counts: dict[str, Any]) -> str:
    """The judge's account in a line."""
    return ", ".join(f"{name} {value}" for name, value in counts.items() if value) or "it keeps no account"


def _candidate(completion: Completion) -> Candidate:
    return Candidate(completion.text, completion.num_tokens, completion.is_complete)


def _side(candidates: Sequence[Candidate]) -> Side:
    return Side(
        characters=float(np.mean([len(one.text) for one in candidates])),
        tokens=float(np.mean([one.num_tokens for one in candidates])),
        complete=float(np.mean([one.is_complete for one in candidates])),
    )


def _needed(delta: float, tie_share: float) -> int | None:
    if delta == 0:
        return None
    # Few decisive prompts can carry a mean that the planning formula's variance leaves no room for.
    delta = min(delta, (1 - tie_share) ** 0.5 / 2)
    needed = prompts_needed(delta, tie_share=tie_share)
    return needed if needed <= MAX_NEEDED else None
