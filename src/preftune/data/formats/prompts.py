"""Prompts without completions, for evaluation: ``{prompt: text or messages}`` or ``{messages: [... user]}``."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.core.records import Demonstration, Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.messages import has_assistant
from preftune.data.formats.pairs import refuse_text
from preftune.data.formats.turns import check_prompt, text_field, tools_of, turns, user


@formats.register("prompts")
@dataclass(frozen=True, slots=True)
class Prompts:
    """Examples without completions; they serve ``read_prompts`` only. A prompt text is a user turn (or raw text)."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has a prompt or messages, and nothing to learn from."""
        if any(has(row, field) for field in ("chosen", "rejected", "completion", "instruction", "preferred_output")):
            return False
        messages = row.get("messages")
        return has(row, "prompt") or (isinstance(messages, (list, tuple)) and bool(messages) and not has_assistant(messages[-1:]))

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The prompt in a row."""
        given = row.get("prompt")
        field = "messages" if given is None else "prompt"
        if isinstance(given, str):
            prompt = user(text_field(row, "prompt"))
        else:
            refuse_text(self.style)
            prompt = turns(row.get(field), field)
        check_prompt(prompt, field)
        tools = tools_of(row.get("tools"), "tools")
        return Example(prompt, (), Demonstration(), provenance, self.style or "chat", tools)
