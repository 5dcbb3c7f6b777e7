"""Alpaca-like pairs: ``{instruction, input, chosen, rejected}``; an ``output`` beside them is not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preftune.core.records import Example, Provenance
from preftune.data.formats.alpaca import instruction_of
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, conversation_only, decisive_pair, no_tools, plain_text, text_pair
from preftune.data.formats.turns import assistant, text_field, user


@formats.register("alpaca-preference")
@dataclass(frozen=True, slots=True)
class AlpacaPreference:
    """Pairs; the prompt is the instruction and, after an empty line, the input where there is one.

    With ``style="text"`` an empty line also parts the prompt from the completion.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has instruction, chosen and rejected, as texts."""
        return has(row, "instruction", "chosen", "rejected") and isinstance(row["chosen"], str)

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        prompt, chosen, rejected = instruction_of(row), text_field(row, "chosen"), text_field(row, "rejected")
        if self.style == "text":
            return text_pair(f"{prompt}\n\n", chosen, rejected, provenance)
        names = ("instruction", "chosen", "rejected")
        return chat_pair(user(prompt), assistant(chosen), assistant(rejected), provenance, names=names)

    def write(self, example: Example) -> dict[str, Any]:
        """The row of a decisive pair with one user turn."""
        conversation_only(example)
        no_tools(example)
        pair = decisive_pair(example)
        prompt, chosen = plain_text(pair.prompt, "prompt"), plain_text(pair.chosen, "chosen completion")
        return {
            "instruction": prompt,
            "input": "",
            "chosen": chosen,
            "rejected": plain_text(pair.rejected, "rejected completion"),
        }
