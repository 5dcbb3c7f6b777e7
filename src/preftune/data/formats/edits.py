"""Completions that somebody edited: ``{prompt, completion, edited}``; the edited one is chosen, the original rejected."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, refuse_text, text_pair
from preftune.data.formats.turns import assistant, text_field, tools_of, turns, user


@formats.register("edits")
@dataclass(frozen=True, slots=True)
class Edits:
    """Edits by a person or a model. Texts are raw text, unless the prompt is a list of messages or ``style`` is chat."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt, completion and edited."""
        return has(row, "prompt", "completion", "edited")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        names = ("prompt", "edited", "completion")
        if row.get("edited") == row.get("completion"):
            raise BadRow("identical", "edited and completion are the same: nothing was changed", field="edited")
        if all(isinstance(row.get(name), str) for name in names) and self.style != "chat":
            prompt_text, edited_text, original_text = (text_field(row, name) for name in names)
            return text_pair(prompt_text, edited_text, original_text, provenance)
        if not isinstance(row.get("prompt"), str):
            refuse_text(self.style)
        prompt = turns(row.get("prompt"), "prompt") if not isinstance(row.get("prompt"), str) else user(text_field(row, "prompt"))
        edited, original = (
            turns(row.get(name), name) if not isinstance(row.get(name), str) else assistant(text_field(row, name))
            for name in names[1:]
        )
        return chat_pair(prompt, edited, original, provenance, tools=tools_of(row.get("tools"), "tools"), names=names)
