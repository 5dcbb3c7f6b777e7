"""preftune's own rows: ``{prompt, first, second, label}`` and ``{prompt, completions, ranks}``. They hold every judgement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from preftune.core.errors import BadRow
from preftune.core.records import Example, Messages, Preference, Provenance, Ranking
from preftune.data.formats.base import CannotHold, Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, chat_ranking, conversation_only, no_tools, refuse_text, rows_of, text_pair
from preftune.data.formats.turns import assistant, number_field, text_field, tools_of, turns, user
from preftune.data.sources.base import kind_of

LABELS = ("first", "second", "tie")


@formats.register("comparison")
@dataclass(frozen=True, slots=True)
class Comparison:
    """Two completions in a neutral order and which is better: ``label`` is first, second or tie.

    strength (0 to 3) and confidence (above 0.5, at most 1) are optional. Texts are raw text, unless the prompt is a list of
    messages or ``style`` is chat.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt, first, second and label."""
        return has(row, "prompt", "first", "second", "label")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The comparison in a row."""
        label = row.get("label")
        if label not in LABELS:
            shown = repr(label) if isinstance(label, str) else kind_of(label)
            raise BadRow("wrong_label", f"label is {shown}; there is {', '.join(LABELS)}", field="label")
        confidence = row.get("confidence")
        judgement = Preference(
            cast(Any, label),
            number_field(row, "strength", 0.0, 3.0) or 0.0,
            None if confidence is None else number_field(row, "confidence", 0.5, 1.0),
        )
        names = ("prompt", "first", "second")
        sides = [row.get(name) for name in names]
        if all(isinstance(side, str) for side in sides) and self.style != "chat":
            texts = [text_field(row, name) for name in names]
            return text_pair(texts[0], texts[1], texts[2], provenance, judgement)
        if any(isinstance(side, (list, tuple)) for side in sides):
            refuse_text(self.style)
        prompt, first, second = (
            as_turn(text_field(row, name)) if isinstance(row.get(name), str) else turns(row.get(name), name)
            for name, as_turn in zip(names, (user, assistant, assistant), strict=True)
        )
        tools = tools_of(row.get("tools"), "tools")
        return chat_pair(prompt, first, second, provenance, tools=tools, names=names, judgement=judgement)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of two completions, a tie among them too."""
        judgement = example.judgement
        if not isinstance(judgement, Preference):
            kind = type(judgement).__name__.lower()
            raise CannotHold(kind, f"the format holds comparisons of two completions, and the row is a {kind}")
        row = {"prompt": _side(example, example.prompt)}
        row |= {name: _side(example, side) for name, side in zip(("first", "second"), example.completions, strict=True)}
        row |= {"label": judgement.preferred}
        if judgement.strength:
            row["strength"] = judgement.strength
        if judgement.confidence is not None:
            row["confidence"] = judgement.confidence
        if example.tools:
            row["tools"] = [dict(tool) for tool in example.tools]
        return row


@formats.register("ranking")
@dataclass(frozen=True, slots=True)
class RankedCompletions:
    """Several completions and the rank of each, 1 = best; equal ranks are ties."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt, completions and ranks."""
        return has(row, "prompt", "completions", "ranks")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The ranking in a row."""
        refuse_text(self.style)
        completions, ranks = row.get("completions"), row.get("ranks")
        for name, value in (("completions", completions), ("ranks", ranks)):
            if not isinstance(value, (list, tuple)):
                raise BadRow("wrong_type", f"{name} is {kind_of(value)}, expected a list", field=name)
        assert isinstance(completions, (list, tuple))
        assert isinstance(ranks, (list, tuple))
        if len(completions) != len(ranks) or not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise BadRow(
                "wrong_label", f"ranks must be {len(completions)} whole numbers from 1, one for each completion", field="ranks"
            )
        prompt = user(text_field(row, "prompt")) if isinstance(row.get("prompt"), str) else turns(row.get("prompt"), "prompt")
        sides = [
            assistant(one) if isinstance(one, str) else turns(one, f"completions.{place}")
            for place, one in enumerate(completions)
        ]
        return chat_ranking(prompt, sides, ranks, provenance, names=("prompt", "completions"))

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a ranking of conversations."""
        if not isinstance(example.judgement, Ranking):
            kind = type(example.judgement).__name__.lower()
            raise CannotHold(kind, f"the format holds rankings, and the row is a {kind}")
        conversation_only(example)
        no_tools(example)
        return {
            "prompt": rows_of(example.prompt),
            "completions": [rows_of(one) for one in example.completions],
            "ranks": list(example.judgement.ranks),
        }


def _side(example: Example, messages: Messages) -> Any:
    return messages[0].content if example.style == "text" else rows_of(messages)
