"""SeekrFlow's ``preference-fine-tune`` rows: ``{messages, chosen, rejected}``, where both sides repeat the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Messages, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, conversation_only, decisive_pair, refuse_text, rows_of
from preftune.data.formats.turns import tools_of, turns


@formats.register("seekrflow")
@dataclass(frozen=True, slots=True)
class SeekrFlow:
    """Pairs; the prompt is taken off both sides where they repeat it, and a side that begins otherwise is refused."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has messages, chosen and rejected."""
        return has(row, "messages", "chosen", "rejected") and isinstance(row["messages"], (list, tuple))

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        refuse_text(self.style)
        prompt = turns(row.get("messages"), "messages")
        sides = [_answer(prompt, turns(row.get(side), side), side) for side in ("chosen", "rejected")]
        names = ("messages", "chosen", "rejected")
        return chat_pair(prompt, sides[0], sides[1], provenance, tools=tools_of(row.get("tools"), "tools"), names=names)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair of conversations."""
        conversation_only(example)
        pair = decisive_pair(example)
        row: dict[str, Any] = {"messages": rows_of(pair.prompt)}
        row |= {"chosen": rows_of((*pair.prompt, *pair.chosen)), "rejected": rows_of((*pair.prompt, *pair.rejected))}
        if example.tools:
            row["tools"] = [dict(tool) for tool in example.tools]
        return row


def _answer(prompt: Messages, side: Messages, field: str) -> Messages:
    if side[: len(prompt)] == prompt:
        return side[len(prompt) :]
    if side and side[0].role != "assistant":
        raise BadRow("prompts_differ", f"{field} begins with other turns than messages", field=field)
    return side
