"""LLaMA-Factory's ShareGPT pairs: ``{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preftune.core.records import Example, Message, Messages, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, conversation_only, decisive_pair, no_tools, plain_text, refuse_text
from preftune.data.formats.turns import sharegpt_turns, text_field, tools_of

_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


@formats.register("llamafactory-sharegpt")
@dataclass(frozen=True, slots=True)
class LlamaFactorySharegpt:
    """Pairs of answers to a conversation; ``system`` and ``tools`` may stand beside it. Turns may also be ``{role, content}``."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has conversations, chosen and rejected."""
        return has(row, "conversations", "chosen", "rejected")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        refuse_text(self.style)
        prompt = with_system(row, sharegpt_turns(row.get("conversations"), "conversations"))
        chosen, rejected = (sharegpt_turns(row.get(side), side) for side in ("chosen", "rejected"))
        names = ("conversations", "chosen", "rejected")
        return chat_pair(prompt, chosen, rejected, provenance, tools=tools_of(row.get("tools") or None, "tools"), names=names)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair with one turn a side."""
        conversation_only(example)
        pair = decisive_pair(example)
        no_tools(example)
        row: dict[str, Any] = {"conversations": [_turn(message) for message in pair.prompt]}
        for side in ("chosen", "rejected"):
            row[side] = {"from": "gpt", "value": plain_text(getattr(pair, side), f"{side} completion")}
        return row


def with_system(row: Row, prompt: Messages) -> Messages:
    """The conversation with the row's ``system`` text at its head, where it has one and the conversation has none."""
    if not row.get("system") or (prompt and prompt[0].role == "system"):
        return prompt
    return (Message("system", text_field(row, "system")), *prompt)


def _turn(message: Message) -> dict[str, str]:
    return {"from": _NAMES[message.role], "value": plain_text((message,), "turn")}
