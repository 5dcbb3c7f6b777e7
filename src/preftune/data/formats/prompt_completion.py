"""TRL's prompt-completion type for SFT: ``{prompt, completion}``, texts or lists of messages."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_demonstration, refuse_text, text_demonstration
from preftune.data.formats.turns import assistant, text_field, tools_of, turns, user


@formats.register("prompt-completion")
@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Demonstrations; two texts are raw text, anything else is a conversation."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt and completion."""
        return has(row, "prompt", "completion")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The demonstration in a row."""
        for field in ("prompt", "completion"):
            if row.get(field) is None:
                raise BadRow("missing_field", f"{field} is missing", field=field)
        lists = [isinstance(row[field], (list, tuple)) for field in ("prompt", "completion")]
        if not any(lists) and self.style != "chat":
            return text_demonstration(text_field(row, "prompt"), text_field(row, "completion"), provenance, "completion")
        if any(lists):
            refuse_text(self.style)
        prompt = turns(row["prompt"], "prompt") if lists[0] else user(text_field(row, "prompt"))
        completion = turns(row["completion"], "completion") if lists[1] else assistant(text_field(row, "completion"))
        if completion[: len(prompt)] == prompt:
            completion = completion[len(prompt) :]
        return chat_demonstration(prompt, completion, provenance, tools=tools_of(row.get("tools"), "tools"))
