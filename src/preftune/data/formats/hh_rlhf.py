r"""Anthropic's hh-rlhf: two dialogues as text, ``\n\nHuman: ...\n\nAssistant: ...``, that differ in the last answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Message, Messages, Provenance
from preftune.data.formats.base import CannotHold, Row, Style, formats
from preftune.data.formats.pairs import chat_pair, decisive_pair, no_tools, plain_text, text_pair
from preftune.data.formats.turns import text_field

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
LAST_ANSWER = "\n\nAssistant:"


@formats.register("hh-rlhf")
@dataclass(frozen=True, slots=True)
class HhRlhf:
    """Pairs; the dialogue becomes turns, whose blanks at both ends are taken off. ``style="text"`` keeps it raw.

    The prompt is everything before the last answer and must be the same on both sides.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has chosen and rejected, of which one is a dialogue in this notation, and no prompt."""
        return row.get("prompt") is None and any(_is_dialogue(row.get(side)) for side in ("chosen", "rejected"))

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
        if chosen == rejected:
            raise BadRow("identical", "chosen and rejected are the same", field="rejected")
        if self.style == "text":
            prompts, answers = zip(
                *(_split(text, field) for text, field in ((chosen, "chosen"), (rejected, "rejected"))), strict=True
            )
            if prompts[0] != prompts[1]:
                raise BadRow("prompts_differ", "the dialogues differ before the last answer", field="rejected")
            return text_pair(prompts[0], answers[0], answers[1], provenance)
        ours, theirs = _turns(chosen, "chosen"), _turns(rejected, "rejected")
        for place, (left, right) in enumerate(zip(ours[:-1], theirs[:-1], strict=False)):
            if left != right:
                raise BadRow("prompts_differ", f"the dialogues differ before the last answer, in turn {place}", field="rejected")
        if len(ours) != len(theirs):
            raise BadRow("prompts_differ", f"the dialogues have {len(ours)} and {len(theirs)} turns", field="rejected")
        return chat_pair(ours[:-1], ours[-1:], theirs[-1:], provenance, names=("chosen", "chosen", "rejected"))

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair of dialogues between a user and an assistant."""
        no_tools(example)
        pair = decisive_pair(example)
        if example.style == "text":
            if not pair.prompt[0].content.endswith(LAST_ANSWER):
                raise CannotHold("raw_text", "the format holds dialogues, and the prompt ends in no Assistant: turn")
            return {side: pair.prompt[0].content + getattr(pair, side)[0].content for side in ("chosen", "rejected")}
        row = {}
        for side in ("chosen", "rejected"):
            completion: Messages = getattr(pair, side)
            plain_text(completion, f"{side} completion")
            row[side] = "".join(_said(message) for message in (*pair.prompt, *completion))
        return row


def _said(message: Message) -> str:
    if message.role not in {"user", "assistant"} or len(message.to_dict()) > 2:
        raise CannotHold("several_turns", f"the format has no place for a {message.role} turn with what it holds")
    if SPEAKER.search("\n\n" + message.content) or message.content != message.content.strip():
        raise CannotHold("ambiguous_text", "a turn's text would be read back as another turn, or without its blanks")
    return f"\n\n{'Human' if message.role == 'user' else 'Assistant'}: {message.content}"


def _is_dialogue(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def _split(text: str, field: str) -> tuple[str, str]:
    prompt, found, answer = text.rpartition(LAST_ANSWER)
    if not found:
        raise BadRow("no_assistant_turn", f"{field} has no Assistant turn", field=field)
    return prompt + found, answer


def _turns(text: str, field: str) -> Messages:
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise BadRow("wrong_type", f"{field} is no dialogue that begins with Human:", field=field)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    messages = tuple(Message("user" if name == "Human" else "assistant", content.strip()) for name, content in pairs)
    if messages[-1].role != "assistant":
        raise BadRow("does_not_end_in_assistant", f"{field} ends in a Human turn", field=field)
    return messages
