"""The kinds of rules that a rules judge can declare: each measures one thing of a completion and weighs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Protocol, TypeAlias

from annotated_types import Gt, MinLen
from pydantic import Field

from preftune.core.errors import UsageError
from preftune.core.registry import Registry
from preftune.judging.reading import Reading, count_phrases, words_of

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Cap: TypeAlias = Annotated[float, Gt(0)] | None
Measure: TypeAlias = Literal["rate", "present", "count"]
Phrases: TypeAlias = frozenset[tuple[str, ...]]

NGRAM = 4  # rep-4 of Welleck et al. 2020 (arXiv:1908.04319): four words repeated are rarely chance


class Rule(Protocol):
    """One measured quality. A completion's points are ``weight * measure_of(reading)``."""

    @property
    def name(self) -> str:
        """What the rule is called in a report; empty = its kind."""

    @property
    def weight(self) -> float:
        """Points for one unit of the measure."""

    def measure_of(self, reading: Reading) -> float:
        """The measure, in the rule's own unit."""

    def vocabulary(self) -> frozenset[str]:
        """The words that the rule knows; what two independent judges may not share."""

    def matches(self, word: str) -> bool:
        """Whether the rule would count this word of another rule."""

    def why_length_pays(self) -> str | None:
        """Why more text alone raises the points without bound, or None."""


rule_kinds: Registry[Rule] = Registry("rule", "preftune.judging", "preftune.rules")


@rule_kinds.register("lexicon")
@dataclass(frozen=True, slots=True, kw_only=True)
class Lexicon:
    """Whole words or phrases, case-insensitive; the longest phrase at a place counts.

    Parameters
        words: the words and phrases.
        measure: ``rate`` = matches per 100 words, ``present`` = 0 or 1, ``count`` = matches.
        cap: the largest value that the measure can take.
    """

    words: Annotated[tuple[str, ...], MinLen(1)]
    weight: Finite
    measure: Measure = "rate"
    cap: Cap = None
    name: str = ""

    def __post_init__(self) -> None:
        for word in self.words:
            if not words_of(word):
                raise UsageError(f"words: {word!r} holds no letter or digit, so it never matches; use kind: pattern")

    def measure_of(self, reading: Reading) -> float:
        """Matches in the text, as ``measure`` says."""
        return _as(self.measure, count_phrases(reading.words, _phrases(self.words)), len(reading.words), self.cap)

    def vocabulary(self) -> frozenset[str]:
        """Every single word of the lexicon."""
        return frozenset(word for phrase in _phrases(self.words) for word in phrase)

    def matches(self, word: str) -> bool:
        """The word is in the vocabulary."""
        return word in self.vocabulary()

    def why_length_pays(self) -> str | None:
        """A count with a positive weight pays for length."""
        return _count_pays(self.measure, self.weight)


@rule_kinds.register("pattern")
@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Matches of a regular expression of RE2, which runs in linear time on any text (no backreferences or lookaround).

    Parameters
        regex: RE2 syntax, case-sensitive unless it starts with ``(?i)``.
        measure, cap: as in ``Lexicon``.
    """

    regex: Annotated[str, MinLen(1)]
    weight: Finite
    measure: Measure = "present"
    cap: Cap = None
    name: str = ""

    def __post_init__(self) -> None:
        _compiled(self.regex)

    def measure_of(self, reading: Reading) -> float:
        """Matches in the text, as ``measure`` says; an empty match is none."""
        # RE2 takes no lone surrogates; a replacement character keeps every other position as it was.
        text = reading.text.encode("utf-8", "replace").decode("utf-8")
        pattern = _compiled(self.regex)
        if self.measure == "present":
            matches = int(pattern.search(text) is not None)
        else:
            matches = sum(1 for found in pattern.finditer(text) if found.end() > found.start())
        return _as(self.measure, matches, len(reading.words), self.cap)

    def vocabulary(self) -> frozenset[str]:
        """None: what a pattern knows is asked by ``matches``."""
        return frozenset()

    def matches(self, word: str) -> bool:
        """The pattern finds something in the word, or in the capitalised word."""
        pattern = _compiled(self.regex)
        return any(pattern.search(form) is not None for form in (word, word.capitalize(), word.upper()))

    def why_length_pays(self) -> str | None:
        """A count with a positive weight pays for length."""
        return _count_pays(self.measure, self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wordless:
    """What rules without words of their own share: no vocabulary, and no pay for length."""

    weight: Finite
    name: str = ""

    def vocabulary(self) -> frozenset[str]:
        """No words."""
        return frozenset()

    def matches(self, word: str) -> bool:
        """No word is counted."""
        del word
        return False

    def why_length_pays(self) -> str | None:
        """The measure is bounded."""
        return None


@rule_kinds.register("complete")
@dataclass(frozen=True, slots=True, kw_only=True)
class Complete(_Wordless):
    """1 where the completion ended by itself, else 0."""

    def measure_of(self, reading: Reading) -> float:
        """1 or 0."""
        return float(reading.is_complete)


@rule_kinds.register("repetition")
@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition(_Wordless):
    """Share of word 4-grams that repeat an earlier one, in [0, 1); give it a negative weight."""

    def measure_of(self, reading: Reading) -> float:
        """1 - distinct 4-grams / 4-grams; 0 for a text of fewer than four words."""
        words = reading.words
        grams = [words[start : start + NGRAM] for start in range(len(words) - NGRAM + 1)]
        return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@rule_kinds.register("mentions")
@dataclass(frozen=True, slots=True, kw_only=True)
class Mentions(_Wordless):
    """Share of the prompt's content words (user turns, stop words left out) that the completion uses, in [0, 1]."""

    def measure_of(self, reading: Reading) -> float:
        """The share; 0 for a prompt without content words."""
        return len(reading.wanted.intersection(reading.words)) / len(reading.wanted) if reading.wanted else 0.0


@rule_kinds.register("length")
@dataclass(frozen=True, slots=True, kw_only=True)
class Length(_Wordless):
    """A penalty for word counts outside a range; inside it, length does not matter.

    Parameters
        min, max: the range in words, both inclusive; at least one of them.
        weight: points lost for a distance as large as the bound that was missed (so an empty text loses ``weight``).
        cap: the largest such distance that counts.
    """

    weight: Annotated[float, Gt(0), Field(allow_inf_nan=False)]
    min: Annotated[int, Gt(0)] | None = None
    max: Annotated[int, Gt(0)] | None = None
    cap: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise UsageError("length: write min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"length: min {self.min} is above max {self.max}")

    def measure_of(self, reading: Reading) -> float:
        """Minus the relative distance to the range; 0 inside."""
        count = len(reading.words)
        distance = 0.0
        if self.min is not None and count < self.min:
            distance = (self.min - count) / self.min
        elif self.max is not None and count > self.max:
            distance = (count - self.max) / self.max
        return -min(distance, self.cap) if distance else 0.0

    def why_length_pays(self) -> str | None:
        """A lower bound without an upper one only ever asks for more."""
        return "min without max only asks for more text; write max too" if self.max is None else None


def _as(measure: Measure, matches: int, num_words: int, cap: float | None) -> float:
    """Matches as a rate per 100 words, a presence or a count, at most ``cap``."""
    value = float(matches)
    if measure == "rate":
        value = 100.0 * matches / num_words if num_words else 0.0
    elif measure == "present":
        value = float(matches > 0)
    return value if cap is None else min(value, cap)


def _count_pays(measure: Measure, weight: float) -> str | None:
    if measure == "count" and weight > 0:
        return "measure: count grows with the text; write measure: rate"
    return None


@lru_cache(maxsize=64)
def _phrases(entries: tuple[str, ...]) -> Phrases:
    return frozenset(words_of(entry) for entry in entries)


@lru_cache(maxsize=64)
def _compiled(regex: str) -> Any:
    """The compiled pattern; re2 is imported only where a judge has patterns."""
    try:
        import re2  # type: ignore[import-untyped]  # ships no stubs
    except ImportError:
        raise UsageError("pattern rules need RE2, which is not installed: pip install google-re2") from None
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(regex, options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
        raise UsageError(
            f"regex {regex!r}: {reason}; RE2 syntax is needed, which has no backreferences and no lookaround"
        ) from None
