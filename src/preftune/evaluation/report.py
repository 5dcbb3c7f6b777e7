"""The report of a run: what is known, in one record; ``render`` writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from preftune.core.records import Excluded, Messages
from preftune.evaluation.heldout import HeldOut
from preftune.evaluation.rounds import RoundResult
from preftune.evaluation.showing import clean, interval_text, percent, points, shorten
from preftune.evaluation.winrate import MAX_MISSING, Judged, WinRate
from preftune.judging.rules import RulePoints, RulesJudge
from preftune.statistics.intervals import Interval

SCHEMA = 1
PAIRS_LABEL = "same judge as the pairs"
WORDS = {
    "better": "Better",
    "worse": "Worse",
    "equivalent": "Equivalent",
    "inconclusive": "Inconclusive",
}


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage of the run: its settings worth showing, and the rows of its ``metrics.jsonl``."""

    name: str
    method: str
    facts: Mapping[str, str | int | float]
    rows: Sequence[Mapping[str, float]]

    @property
    def last(self) -> dict[str, float]:
        """The newest value of every metric."""
        return {name: value for row in self.rows for name, value in row.items()}


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with both texts, their points by rule and the result.

    why: ``drawn`` at random, or one that was ``lost`` or ``disputed`` (the orders disagree), shown beside the random ones.
    """

    prompt: Messages
    policy: str
    baseline: str
    policy_points: tuple[RulePoints, ...]
    baseline_points: tuple[RulePoints, ...]
    label: str
    score: float
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report says.

    Parameters
        run: the run's name. created: when, ISO 8601.
        win_rate: under the judge of the verdict. pairs_win_rate: under the judge that made the pairs, shown as such.
        policy, baseline: the two models in the words of a sentence ("the tuned model").
        counts: for each data set, what was read and used. excluded: every row that was left out.
        samples: see ``samples_of``. configuration: the resolved recipe, as YAML.
        environment: versions and machine. seeds, digests: what reproduces the run. timings: seconds by part.
        uses: how often these prompts have been used for a verdict, this time included.
        shared_words: words that both judges know; none where they are independent.
        notes: sentences for the reader, such as alerts, fallbacks, or the reason for an override.
        rounds: what each round of generate and train was worth; empty where there were none.
    """

    run: str
    created: str
    win_rate: WinRate
    policy: str = "the tuned model"
    baseline: str = "the model before"
    pairs_win_rate: WinRate | None = None
    held_out: HeldOut | None = None
    stages: Sequence[StageReport] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    excluded: Sequence[Excluded] = ()
    samples: Sequence[Sample] = ()
    configuration: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    uses: int = 1
    shared_words: Sequence[str] = ()
    notes: Sequence[str] = ()
    rounds: Sequence[RoundResult] = ()

    @property
    def sentence(self) -> str:
        """The verdict in one sentence of plain words, with interval, prompts, judge and the smallest detectable effect."""
        rate = self.win_rate
        only = "only " if rate.verdict == "worse" else ""
        if rate.lacks_judgements:
            return self._without_verdict()
        ending = {
            "better": "",
            "worse": "",
            "equivalent": f"; the whole interval lies within {points(rate.margin)} of one half",
            "inconclusive": "; the interval holds one half"
            + (f", and about {rate.needed:,} prompts would show a difference of this size" if rate.needed else ""),
        }[rate.verdict]
        return clean(
            f"{WORDS[rate.verdict]}: {self.policy} wins {only}{percent(rate.rate)} {interval_text(rate.interval)} of "
            f"{rate.num_prompts:,} unseen {'prompt' if rate.num_prompts == 1 else 'prompts'} against {self.baseline}, "
            f"judged by {rate.judge_label} in both orders{ending}; smallest detectable effect {points(rate.detectable)}."
        )

    def _without_verdict(self) -> str:
        rate = self.win_rate
        total = rate.num_judged + rate.num_missing
        return clean(
            f"Inconclusive: the judge gave no verdict of {rate.num_missing} of {total:,} pairs ({percent(rate.missing_share)}), "
            f"more than {percent(MAX_MISSING)}, so the rest may be unlike them; {self.policy} wins {percent(rate.rate)} "
            f"{interval_text(rate.interval)} of the {rate.num_prompts:,} unseen prompts judged against {self.baseline}, "
            f"judged by {rate.judge_label} in both orders."
        )

    def judge_sentences(self) -> list[str]:
        """The judge's own preferences and failures in plain words."""
        return judge_sentences(self.win_rate)

    def exclusions(self) -> list[dict[str, Any]]:
        """Excluded rows by file and reason: how many, and the first of them."""
        groups: dict[tuple[str, str], list[Excluded]] = {}
        for row in self.excluded:
            groups.setdefault((row.file, row.reason), []).append(row)
        return [
            {
                "file": clean(file),
                "reason": clean(reason),
                "count": len(rows),
                "line": rows[0].line,
                "detail": clean(rows[0].detail),
            }
            for (file, reason), rows in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON values; every figure that Markdown and HTML show is here, unrounded."""
        same = self.pairs_win_rate
        return {
            "schema": SCHEMA,
            "run": self.run,
            "created": self.created,
            "verdict": self.win_rate.verdict,
            "sentence": self.sentence,
            "policy": self.policy,
            "baseline": self.baseline,
            "win_rate": self.win_rate.to_dict(),
            "pairs_win_rate": None if same is None else {"label": PAIRS_LABEL, **same.to_dict()},
            "judges_share": list(self.shared_words),
            "judge_sentences": self.judge_sentences(),
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "verdict_set_uses": self.uses,
            "stages": [
                {"name": stage.name, "method": stage.method, "facts": dict(stage.facts), "last": stage.last}
                for stage in self.stages
            ],
            "data": {name: dict(counts) for name, counts in self.counts.items()},
            "excluded": self.exclusions(),
            "samples": [_sample_row(sample) for sample in self.samples],
            "configuration": clean(self.configuration),
            "environment": {key: clean(value) for key, value in self.environment.items()},
            "seeds": dict(self.seeds),
            "digests": dict(self.digests),
            "timings_s": dict(self.timings),
            "notes": [clean(note) for note in self.notes],
            "rounds": [one.to_dict() for one in self.rounds],
        }


def judge_sentences(rate: WinRate) -> list[str]:
    """What the judge prefers apart from quality, and how asking it went."""
    bias = rate.bias
    place = _leaning(bias.first_interval, "the first place", "the second place")
    shown_first = f"Shown first, a text wins {percent(bias.first)} {interval_text(bias.first_interval)} of its judgements"
    lines = [f"{shown_first} ({place}); averaging both orders cancels it."]
    if bias.longer is None or bias.longer_interval is None:
        lines.append(f"Whether the judge prefers longer texts is not known: {bias.reason}.")
    else:
        lines.append(
            f"The longer text wins {percent(bias.longer)} {interval_text(bias.longer_interval)}, whichever model wrote it "
            f"({_leaning(bias.longer_interval, 'longer texts', 'shorter texts')}); the rate at equal length takes this out."
        )
    if rate.num_missing:
        lines.append(
            f"The judge gave no verdict of {rate.num_missing:,} of {rate.num_judged + rate.num_missing:,} pairs "
            f"({percent(rate.missing_share)}); they are in no figure."
        )
    if rate.judge_counts:
        lines.append(counts_sentence(rate.judge_counts))
    return [clean(line) for line in lines]


def counts_sentence(counts: Mapping[str, Any]) -> str:
    """The account of an LLM judge in one sentence."""
    statuses = ", ".join(f"{count:,} x HTTP {status}" for status, count in counts.get("by_status", {}).items())
    tokens = counts.get("tokens", {})
    names = ("retried", "timeouts", "connection_errors", "malformed", "missing")
    rest = ", ".join(f"{counts.get(name, 0):,} {name.replace('_', ' ')}" for name in names)
    return (
        f"Asking the judge: {counts.get('calls', 0):,} calls ({statuses or 'no answer'}), {counts.get('cached', 0):,} answers "
        f"kept from before, {rest}; {tokens.get('prompt', 0):,} tokens read and {tokens.get('completion', 0):,} written."
    )


def _leaning(interval: Interval, above: str, below: str) -> str:
    if interval.low > 0.5:
        return f"it prefers {above}"
    return f"it prefers {below}" if interval.high < 0.5 else "no preference is shown"


def samples_of(win_rate: WinRate, judge: object, *, count: int = 6, losses: int = 2, seed: int = 0) -> tuple[Sample, ...]:
    """Texts for the report: ``count`` prompts drawn at random, then some that the policy lost or whose orders disagree.

    Parameters
        judge: a rules judge gives the points by rule; any other one gives none.
        losses: how many lost or disputed prompts to add, so that a reader sees where the policy fails.
    """
    judged = win_rate.judged
    order = [int(index) for index in np.random.default_rng(seed).permutation(len(judged))]
    drawn, rest = order[:count], order[count:]
    lost = [index for index in rest if judged[index].label == "loss"][:losses]
    disputed = [index for index in rest if index not in lost and not judged[index].is_consistent][: losses - len(lost)]
    picked = [(index, "drawn") for index in drawn] + [(i, "lost") for i in lost] + [(i, "disputed") for i in disputed]
    return tuple(_sample(judged[index], judge, why) for index, why in picked)


def without_nonfinite(value: Any) -> Any:
    """JSON has no NaN and no infinity: a metric that is not finite is written as text, never as a number."""
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {clean(str(key)): without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(inner) for inner in value]
    return clean(value) if isinstance(value, str) else value


def _sample(judged: Judged, judge: object, why: str) -> Sample:
    scored = judge if isinstance(judge, RulesJudge) else None
    ours, theirs = (
        () if scored is None else tuple(scored.breakdown(judged.prompt, candidate))
        for candidate in (judged.policy, judged.baseline)
    )
    return Sample(judged.prompt, judged.policy.text, judged.baseline.text, ours, theirs, judged.label, judged.score, why)


def _sample_row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": [{"role": message.role, "content": clean(message.content)} for message in sample.prompt],
        "policy": shorten(clean(sample.policy)),
        "baseline": shorten(clean(sample.baseline)),
        "policy_points": [asdict(one) for one in sample.policy_points],
        "baseline_points": [asdict(one) for one in sample.baseline_points],
        "label": sample.label,
        "score": sample.score,
        "why": sample.why,
    }
