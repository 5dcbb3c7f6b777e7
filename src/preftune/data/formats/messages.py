"""Conversations for SFT: ``{messages: [...]}`` with at least one assistant turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance, demonstration_of
from preftune.data.formats.base import CannotHold, Row, Style, formats, has
from preftune.data.formats.pairs import chat_demonstration, conversation_only, refuse_text, rows_of
from preftune.data.formats.turns import tools_of, turns


@formats.register("messages")
@dataclass(frozen=True, slots=True)
class Conversation:
    """Demonstrations: the completion is everything from the first assistant turn on, and every assistant turn in it
    is scored; the turns of users and tools between them are context. Assistant turns of ``weight`` 0 before the first
    other one belong to the prompt.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has messages with an assistant turn, and no pair."""
        value = row.get("messages")
        others = ("chosen", "completion", "label", "kto_tag", "schemaVersion")
        return isinstance(value, (list, tuple)) and not any(has(row, key) for key in others) and has_assistant(value)

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The demonstration in a row."""
        refuse_text(self.style)
        messages = turns(row.get("messages"), "messages")
        weights = [given.get("weight") for given in row["messages"]]
        scored = [place for place, message in enumerate(messages) if message.role == "assistant" and weights[place] != 0]
        first = scored[0] if scored else None
        for place, message in enumerate(messages[first:] if first is not None else ()):
            if message.role == "assistant" and weights[place + (first or 0)] == 0:
                field = f"messages.{place + (first or 0)}.weight"
                detail = f"{field} is 0 behind a turn that is trained: only turns before the first trained one can be left out"
                raise BadRow("unsupported_field", detail, field=field)
        if first is None:
            raise BadRow("no_assistant_turn", "messages has no assistant turn", field="messages")
        tools = tools_of(row.get("tools"), "tools")
        names = ("messages", "messages")
        return chat_demonstration(messages[:first], messages[first:], provenance, tools=tools, names=names)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a demonstration, or of what SFT would take of a pair."""
        conversation_only(example)
        completion = demonstration_of(example)
        if completion is None:
            raise CannotHold("not_a_demonstration", "no completion of the row is said to be good")
        before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in rows_of(example.prompt)]
        row: dict[str, Any] = {"messages": before + rows_of(completion)}
        if example.tools:
            row["tools"] = [dict(tool) for tool in example.tools]
        return row


def has_assistant(value: object) -> bool:
    """Whether a list of messages holds an assistant turn."""
    return isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) and one.get("role") == "assistant" for one in value)
