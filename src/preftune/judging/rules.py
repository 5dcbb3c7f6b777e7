"""The judge that is declared rather than trained: points for measurable qualities, written in YAML, no code.

    name: rules
    title: friendly tone
    tie_margin: 0.5            # a difference in points below this is a tie
    rules:
      - {kind: lexicon, name: warm, words: [kind, thank you], measure: rate, weight: 1.0, cap: 8}
      - {kind: lexicon, name: gruff, words: [stupid], measure: rate, weight: -1.0, cap: 8}
      - {kind: pattern, name: shouting, regex: "[A-Z]{6,}", measure: present, weight: -1.0}
      - {kind: complete, weight: 2.0}
      - {kind: repetition, weight: -4.0}
      - {kind: mentions, weight: 1.0}
      - {kind: length, min: 20, max: 200, weight: 2.0}

A completion's score is the sum of ``weight * measure``. The verdict depends on the two scores only, so it is the same
in both orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

from annotated_types import Ge, MinLen
from pydantic import Field

from preftune.core.errors import UsageError
from preftune.core.ids import digest_json
from preftune.core.records import Messages
from preftune.core.registry import suggest
from preftune.judging.base import Candidate, Verdict, judges, load_judge
from preftune.judging.kinds import Rule, rule_kinds
from preftune.judging.reading import read

SCORING = 1  # part of a judge's identity: raise it when the same rules come to mean other points


@dataclass(frozen=True, slots=True)
class RulePoints:
    """What one rule gave a completion: ``points = weight * measure``."""

    name: str
    measure: float
    weight: float
    points: float


@judges.register("rules")
@dataclass(frozen=True)
class RulesJudge:
    """Points for declared qualities; the higher sum wins.

    Parameters
        rules: mappings with ``kind`` and the options of that kind; see the module's example.
        tie_margin: a difference in points below this is a tie.
        title: what the judge is called in reports; part of no verdict.

    Raises
        UsageError: an unknown kind or option, with the nearest known one; a value that cannot be.

    >>> judge = RulesJudge(({"kind": "lexicon", "words": ["kind"], "weight": 1.0},))
    >>> judge.score((), Candidate("A kind word.", 5, True))  # 1 match in 3 words, per 100 words
    33.333333333333336
    """

    rules: Annotated[tuple[dict[str, Any], ...], MinLen(1)]
    tie_margin: Annotated[float, Ge(0), Field(allow_inf_nan=False)] = 0.0
    title: str = ""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.named_rules]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise UsageError(f"rules.{index}: two rules are called {name!r}; give each its own name")

    @cached_property
    def named_rules(self) -> tuple[tuple[str, Rule], ...]:
        """The built rules with the names that reports show."""
        return tuple(_build_rule(given, f"rules.{index}") for index, given in enumerate(self.rules))

    @cached_property
    def identity(self) -> str:
        """Digest of the rules and the margin; the title and the order of keys do not count."""
        return digest_json({"name": "rules", "scoring": SCORING, "tie_margin": self.tie_margin, "rules": self._settings()})

    @property
    def label(self) -> str:
        """The judge in a few words, for a sentence: its title, or the start of its digest."""
        return f"rules '{self.title}'" if self.title else f"rules {self.identity[:8]}"

    @property
    def rewards_length(self) -> list[str]:
        """Rules whose points grow without bound when text is only added, with the way out; empty where none does."""
        found = ((name, rule.why_length_pays()) for name, rule in self.named_rules)
        return [f"{name}: {reason}" for name, reason in found if reason is not None]

    def describe(self) -> dict[str, Any]:
        """Name, title, label, identity and the full settings, in JSON values."""
        return {
            "name": "rules",
            "title": self.title,
            "label": self.label,
            "identity": self.identity,
            "tie_margin": self.tie_margin,
            "rules": self._settings(),
        }

    def vocabulary(self) -> frozenset[str]:
        """Every word that some rule knows."""
        return frozenset().union(*(rule.vocabulary() for _, rule in self.named_rules))

    def breakdown(self, prompt: Messages, candidate: Candidate) -> list[RulePoints]:
        """What each rule gave the completion, in the order declared."""
        reading = read(prompt, candidate)
        measured = ((name, rule.measure_of(reading), rule.weight) for name, rule in self.named_rules)
        return [RulePoints(name, measure, weight, weight * measure + 0.0) for name, measure, weight in measured]

    def score(self, prompt: Messages, candidate: Candidate) -> float:
        """The completion's points."""
        return sum(rule.points for rule in self.breakdown(prompt, candidate))

    def __call__(self, prompt: Messages, first: Candidate, second: Candidate) -> Verdict:
        """The higher score wins; a difference below the margin, or none, is a tie."""
        scores = self.score(prompt, first), self.score(prompt, second)
        difference = scores[0] - scores[1]
        detail = {"first": scores[0], "second": scores[1]}
        if difference == 0 or abs(difference) < self.tie_margin:
            return Verdict(0.5, "tie", detail)
        return Verdict(1.0, "first", detail) if difference > 0 else Verdict(0.0, "second", detail)

    def _settings(self) -> list[dict[str, Any]]:
        """Each rule with its defaults filled in, so that leaving a default out changes no identity."""
        # Every kind is a dataclass, which the protocol Rule cannot say.
        built = [
            {"kind": given["kind"], **asdict(cast(Any, rule))}
            for given, (_, rule) in zip(self.rules, self.named_rules, strict=True)
        ]
        return [{key: list(value) if isinstance(value, tuple) else value for key, value in row.items()} for row in built]


def independence(pairs_judge: RulesJudge, verdict_judge: RulesJudge) -> list[str]:
    """The words that both judges know, sorted; empty where the judges share none.

    A word counts as shared where both vocabularies hold it or where a pattern of one finds it in the vocabulary of
    the other; two equal patterns are shared too, shown as ``/regex/``.
    """
    shared: set[str] = set()
    for one, other in ((pairs_judge, verdict_judge), (verdict_judge, pairs_judge)):
        shared |= {word for word in one.vocabulary() for _, rule in other.named_rules if rule.matches(word)}
    patterns = [{rule["regex"] for rule in judge.rules if rule["kind"] == "pattern"} for judge in (pairs_judge, verdict_judge)]
    shared |= {f"/{regex}/" for regex in patterns[0] & patterns[1]}
    return sorted(shared)


def load_rules(spec: str | Mapping[str, Any], base_folder: Path) -> RulesJudge:
    """``load_judge`` where the judge must be a rules judge, because its scores are needed.

    Raises
        UsageError: the judge is of another kind.
    """
    judge = load_judge(spec, base_folder)
    if not isinstance(judge, RulesJudge):
        raise UsageError(f"judge {judge.describe().get('name')!r} gives no scores by rule; write name: rules")
    return judge


def _build_rule(given: Mapping[str, Any], where: str) -> tuple[str, Rule]:
    options = dict(given)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError(f"{where}: kind is missing: {suggest('', rule_kinds.names())}")
    words = options.get("words")
    if isinstance(words, (list, tuple)):
        for word in words:
            if not isinstance(word, str):
                raise UsageError(
                    f"{where}.words: {word!r} is no text; YAML reads yes, no, on, off and numbers so: put it in quotes"
                )
    try:
        rule = rule_kinds.build(kind, options)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None
    return rule.name or kind, rule
