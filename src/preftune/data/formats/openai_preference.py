"""OpenAI's and Together's preference rows: ``{input: {messages, tools}, preferred_output, non_preferred_output}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, conversation_only, decisive_pair, refuse_text, rows_of
from preftune.data.formats.turns import tools_of, turns
from preftune.data.sources.base import kind_of


@formats.register("openai-preference")
@dataclass(frozen=True, slots=True)
class OpenAIPreference:
    """Pairs for a hosted fine-tuning API. ``parallel_tool_calls`` is accepted and has no effect on training."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has the two outputs."""
        return has(row, "preferred_output", "non_preferred_output")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        refuse_text(self.style)
        given = row.get("input")
        if given is None:
            raise BadRow("missing_field", "input is missing", field="input")
        if not isinstance(given, Mapping):
            raise BadRow("wrong_type", f"input is {kind_of(given)}, expected an object with messages", field="input")
        return chat_pair(
            turns(given.get("messages"), "input.messages"),
            turns(row.get("preferred_output"), "preferred_output"),
            turns(row.get("non_preferred_output"), "non_preferred_output"),
            provenance,
            tools=tools_of(given.get("tools"), "input.tools"),
            names=("input.messages", "preferred_output", "non_preferred_output"),
        )

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair of conversations."""
        conversation_only(example)
        pair = decisive_pair(example)
        given: dict[str, Any] = {"messages": rows_of(pair.prompt)}
        if example.tools:
            given["tools"] = [dict(tool) for tool in example.tools]
        return {"input": given, "preferred_output": rows_of(pair.chosen), "non_preferred_output": rows_of(pair.rejected)}
