"""TRL's prompt-completion type for SFT: ``{prompt, completion}``, texts or lists of messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance, demonstration_of
from preftune.data.formats.base import CannotHold, Row, Style, formats, has
from preftune.data.formats.pairs import chat_demonstration, refuse_text, rows_of, text_demonstration
from preftune.data.formats.turns import assistant, text_field, tools_of, turns, user


@formats.register("prompt-completion")
@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Demonstrations; two texts are raw text, anything else is a conversation."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt and completion."""
        return has(row, "prompt", "completion") and not any(has(row, key) for key in ("label", "edited"))

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

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a demonstration, or of what SFT would take of a pair."""
        completion = demonstration_of(example)
        if completion is None:
            raise CannotHold("not_a_demonstration", "no completion of the row is said to be good")
        if example.style == "text":
            return {"prompt": example.prompt[0].content, "completion": completion[0].content}
        row: dict[str, Any] = {"prompt": rows_of(example.prompt), "completion": rows_of(completion)}
        if example.tools:
            row["tools"] = [dict(tool) for tool in example.tools]
        return row
