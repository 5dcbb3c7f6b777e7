"""Conversations for SFT: ``{messages: [...]}`` with at least one assistant turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_demonstration, refuse_text
from preftune.data.formats.turns import tools_of, turns


@formats.register("messages")
@dataclass(frozen=True, slots=True)
class Conversation:
    """Demonstrations: the completion is everything from the first assistant turn on, and every assistant turn in it
    is scored; the turns of users and tools between them are context.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has messages with an assistant turn, and no pair."""
        value = row.get("messages")
        return isinstance(value, (list, tuple)) and not has(row, "chosen") and not has(row, "completion") and has_assistant(value)

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The demonstration in a row."""
        refuse_text(self.style)
        messages = turns(row.get("messages"), "messages")
        for place, given in enumerate(row["messages"]):
            if given.get("weight") == 0:
                field = f"messages.{place}.weight"
                raise BadRow("unsupported_field", f"{field} is 0: turns without weight are not supported", field=field)
        first = next((place for place, message in enumerate(messages) if message.role == "assistant"), None)
        if first is None:
            raise BadRow("no_assistant_turn", "messages has no assistant turn", field="messages")
        tools = tools_of(row.get("tools"), "tools")
        names = ("messages", "messages")
        return chat_demonstration(messages[:first], messages[first:], provenance, tools=tools, names=names)


def has_assistant(value: object) -> bool:
    """Whether a list of messages holds an assistant turn."""
    return isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) and one.get("role") == "assistant" for one in value)
