"""Prompts without completions, for evaluation: ``{prompt}`` (text or messages), ``{messages}``, ``{instruction, input}``, or
MT-Bench's ``{turns}``, of which the first is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from preftune.core.records import Demonstration, Example, Provenance
from preftune.data.formats.alpaca import instruction_of
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
        learnt = ("chosen", "rejected", "completion", "completions", "output", "preferred_output", "first", "response1")
        judged = ("overall_preference", "preference_strength", "winner", "winner_model_a", "kto_tag")
        if any(has(row, field) for field in (*learnt, *judged)) or isinstance(row.get("prompt"), Mapping):
            return False
        if has(row, "prompt") or has(row, "instruction") or _is_benchmark(row):
            return True
        messages = row.get("messages")
        if not isinstance(messages, (list, tuple)) or not messages or has_assistant(messages[-1:]):
            return False
        return not (isinstance(messages[-1], Mapping) and "candidates" in messages[-1])

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The prompt in a row."""
        if row.get("prompt") is None and row.get("instruction") is not None:
            row = {**row, "prompt": instruction_of(row)}
        elif _is_benchmark(row):
            row = {**row, "prompt": row["turns"][0]}
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


def _is_benchmark(row: Row) -> bool:
    """MT-Bench's rows: a list of user turns, of which only the first can be asked before anything is answered."""
    given = row.get("turns")
    return row.get("prompt") is None and isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], str)
