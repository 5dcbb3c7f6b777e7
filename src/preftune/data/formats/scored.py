"""Pairs and sets with scores: UltraFeedback (raw ratings, and binarised by H4), HelpSteer2 and HelpSteer3."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preftune.core.errors import BadRow
from preftune.core.records import Example, Preference, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, chat_ranking, refuse_text, strength_of
from preftune.data.formats.trl_preference import TrlPreference
from preftune.data.formats.turns import assistant, text_field, turns, user
from preftune.data.sources.base import kind_of

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
H4_SCALE = 3.0  # scores run from 1 to 10: a difference of 3 is one step of strength


@formats.register("ultrafeedback")
@dataclass(frozen=True, slots=True)
class UltraFeedback:
    """Raw ratings: an instruction with several completions, ranked by the mean of their aspect ratings.

    The mean over helpfulness, honesty, instruction following and truthfulness, as Argilla's cleaning of the set has it,
    because its ``overall_score`` is known to be wrong in many rows; that score is used only where no aspect is rated.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has an instruction and completions that are objects."""
        completions = row.get("completions")
        return (
            has(row, "instruction")
            and isinstance(completions, (list, tuple))
            and all(isinstance(one, Mapping) for one in completions)
        )

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The ranking in a row."""
        refuse_text(self.style)
        given = row.get("completions")
        if not isinstance(given, (list, tuple)):
            raise BadRow("wrong_type", f"completions is {kind_of(given)}, expected a list", field="completions")
        rated = [(_text_of(one, place), _rating(one, place)) for place, one in enumerate(given)]
        order = sorted({rating for _, rating in rated}, reverse=True)
        ranks = [order.index(rating) + 1 for _, rating in rated]
        prompt = user(text_field(row, "instruction"))
        return chat_ranking(
            prompt, [assistant(text) for text, _ in rated], ranks, provenance, names=("instruction", "completions")
        )


@formats.register("ultrafeedback-binarized")
@dataclass(frozen=True, slots=True)
class UltraFeedbackBinarised:
    """H4's pairs with ``score_chosen`` and ``score_rejected``: equal ones are a tie, a third of their difference the strength."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has chosen, rejected and the score of each."""
        return has(row, "chosen", "rejected", "score_chosen", "score_rejected")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        example = TrlPreference(self.style).read(row, provenance)
        difference = _score(row, "score_chosen") - _score(row, "score_rejected")
        if difference < 0:
            raise BadRow("scores_contradict", "score_chosen is below score_rejected", field="score_chosen")
        judgement = Preference("tie") if difference == 0 else Preference("first", strength_of(difference, H4_SCALE))
        return Example(example.prompt, example.completions, judgement, provenance, example.style, example.tools)


@formats.register("helpsteer")
@dataclass(frozen=True, slots=True)
class HelpSteer:
    """HelpSteer3 (``context``, ``response1``, ``response2``, ``overall_preference``) and HelpSteer2's preference rows.

    -3 means that the first is much better, 3 that the second is, 0 is a tie. Where at least two annotators' own scores are
    given, the confidence is the share of them that prefer the same side, if that is a majority.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has two responses and a preference between them."""
        return has(row, "response1", "response2", "overall_preference") or has(
            row, "response_1", "response_2", "preference_strength"
        )

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The comparison in a row."""
        refuse_text(self.style)
        is_third = row.get("overall_preference") is not None
        names = ("context", "response1", "response2") if is_third else ("prompt", "response_1", "response_2")
        field = "overall_preference" if is_third else "preference_strength"
        value = _score(row, field)
        if not -3 <= value <= 3:
            raise BadRow("wrong_label", f"{field} is {value:g}, expected -3 to 3", field=field)
        preferred: Literal["first", "second", "tie"] = "tie" if value == 0 else "first" if value < 0 else "second"
        given = row.get(names[0])
        prompt = user(text_field(row, names[0])) if isinstance(given, str) else turns(given, names[0])
        sides = [assistant(text_field(row, name)) for name in names[1:]]
        judgement = Preference(preferred, strength_of(value), _agreement(row, value))
        return chat_pair(prompt, sides[0], sides[1], provenance, names=names, judgement=judgement)


def _agreement(row: Row, value: float) -> float | None:
    given = row.get("individual_preference")
    if value == 0 or not isinstance(given, (list, tuple)):
        return None
    scores = [one.get("score") for one in given if isinstance(one, Mapping)]
    numbers = [score for score in scores if isinstance(score, (int, float))]
    if len(numbers) < 2:
        return None
    share = sum(score * value > 0 for score in numbers) / len(numbers)
    return share if share > 0.5 else None


def _score(row: Row, field: str) -> float:
    value = row.get(field)
    if value is None:
        raise BadRow("missing_field", f"{field} is missing", field=field)
    number = _number(value)
    if number is None:
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected a number", field=field)
    return number


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _text_of(completion: Mapping[str, Any], place: int) -> str:
    if not isinstance(completion, Mapping):
        raise BadRow(
            "wrong_type", f"completions.{place} is {kind_of(completion)}, expected an object", field=f"completions.{place}"
        )
    return text_field(completion, "response")


def _rating(completion: Mapping[str, Any], place: int) -> float:
    annotations = completion.get("annotations")
    if isinstance(annotations, str):
        try:
            annotations = json.loads(annotations)
        except ValueError:
            annotations = None
    found: Sequence[float] = ()
    if isinstance(annotations, Mapping):
        rated = (annotations.get(aspect) for aspect in ASPECTS)
        numbers = [_number(one.get("Rating")) if isinstance(one, Mapping) else None for one in rated]
        found = [number for number in numbers if number is not None]
    if found:
        return sum(found) / len(found)
    for name in ("rating", "overall_score", "fine-grained_score"):
        number = _number(completion.get(name))
        if number is not None:
            return number
    raise BadRow("missing_field", f"completions.{place} has no rating", field=f"completions.{place}.annotations")
