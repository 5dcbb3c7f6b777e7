"""TRL's preference type: ``{prompt, chosen, rejected}`` or ``{chosen, rejected}``, texts or lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Messages, Preference, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.hh_rlhf import HhRlhf
from preftune.data.formats.pairs import chat_pair, decisive_pair, refuse_text, text_pair, written_pair
from preftune.data.formats.turns import assistant, number_field, text_field, tools_of, turns, user


@formats.register("trl-preference")
@dataclass(frozen=True, slots=True)
class TrlPreference:
    """Standard (text, trained as raw text) and conversational pairs, with explicit or implicit prompt.

    Accepted beside TRL's own shapes: a prompt text beside message lists (H4), texts beside a prompt conversation, and
    chosen and rejected that repeat the prompt at their head; the repetition is taken off. Without a prompt, it is the
    turns that both sides begin with, which must end where an assistant turn differs; of texts, the common beginning
    up to the last blank.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has chosen and rejected, and nothing that belongs to a richer format."""
        if not has(row, "chosen", "rejected") or HhRlhf().matches(row):
            return False
        richer = ("instruction", "messages", "conversations", "question", "kto_tag")
        return not any(has(row, key) for key in richer) and not has(row, "score_chosen", "score_rejected")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row; ``strength`` (0 to 3) and ``confidence`` beside it are kept."""
        example = self._pair(row, provenance)
        if row.get("strength") is None and row.get("confidence") is None:
            return example
        strength, confidence = number_field(row, "strength", 0.0, 3.0), number_field(row, "confidence", 0.5, 1.0)
        return replace(example, judgement=Preference("first", strength or 0.0, confidence))

    def _pair(self, row: Row, provenance: Provenance) -> Example:
        for field in ("chosen", "rejected"):
            if row.get(field) is None:
                raise BadRow("missing_field", f"{field} is missing", field=field)
        if isinstance(row["chosen"], (list, tuple)) or isinstance(row["rejected"], (list, tuple)):
            return self._conversations(row, provenance)
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
        prompt = row.get("prompt")
        if isinstance(prompt, (list, tuple)):
            refuse_text(self.style)
            return chat_pair(turns(prompt, "prompt"), assistant(chosen), assistant(rejected), provenance, tools=_tools(row))
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected)
        else:
            prompt = text_field(row, "prompt")
            if prompt and all(text.startswith(prompt) and text[len(prompt) :].strip() for text in (chosen, rejected)):
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if self.style == "chat":
            return chat_pair(user(prompt), assistant(chosen), assistant(rejected), provenance, tools=_tools(row))
        return text_pair(prompt, chosen, rejected, provenance)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair: texts for raw text, lists of messages for conversations."""
        pair, row = decisive_pair(example), written_pair(example)
        if pair.strength:
            row["strength"] = pair.strength
        if pair.confidence is not None:
            row["confidence"] = pair.confidence
        return row

    def _conversations(self, row: Row, provenance: Provenance) -> Example:
        refuse_text(self.style)
        chosen, rejected = turns(row["chosen"], "chosen"), turns(row["rejected"], "rejected")
        given = row.get("prompt")
        if given is None:
            prompt, chosen, rejected = split_turns(chosen, rejected)
        elif isinstance(given, str):
            prompt, chosen, rejected = _with_prompt_text(given, chosen, rejected)
        else:
            prompt = turns(given, "prompt")
            size = len(prompt)
            if prompt and chosen[:size] == prompt and rejected[:size] == prompt:
                chosen, rejected = chosen[size:], rejected[size:]
        return chat_pair(prompt, chosen, rejected, provenance, tools=_tools(row))


def split_turns(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The turns that both conversations begin with, and what is left of each.

    Raises
        BadRow: ``identical``, ``empty_completion`` where one ends inside the other, ``prompts_differ`` where the first
            turn that differs is not an assistant's.
    """
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same", field="rejected")
    size = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        size += 1
    for field, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) == size:
            raise BadRow("empty_completion", f"{field} ends where the other goes on, after {size} turns", field=field)
    if chosen[size].role != "assistant" or rejected[size].role != "assistant":
        detail = f"chosen and rejected differ first in turn {size}, a {chosen[size].role} turn: their prompts differ"
        raise BadRow("prompts_differ", detail, field=f"rejected.{size}")
    return chosen[:size], chosen[size:], rejected[size:]


def _with_prompt_text(given: str, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """A prompt text beside message lists: the lists are answers, or whole conversations that hold the text."""
    if chosen and rejected and chosen[0].role == rejected[0].role == "assistant":
        return user(given), chosen, rejected
    prompt, chosen, rejected = split_turns(chosen, rejected)
    if not any(message.content.strip() == given.strip() for message in prompt):
        raise BadRow("prompts_differ", "prompt is none of the turns that chosen and rejected begin with", field="prompt")
    return prompt, chosen, rejected


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The text that both sides begin with up to its last blank, so that no word is cut; and what is left of each."""
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same", field="rejected")
    pairs = zip(chosen, rejected, strict=False)
    size = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(chosen), len(rejected)))
    common = chosen[:size]
    while size and not common[size - 1].isspace():
        size -= 1
    if common[size - 1 : size] == " ":
        size -= 1  # the blank belongs to the word behind it, as in most vocabularies
    if not common[:size].strip():
        raise BadRow("missing_field", "prompt is missing, and chosen and rejected begin differently", field="prompt")
    return common[:size], chosen[size:], rejected[size:]


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    return tools_of(row.get("tools"), "tools")
