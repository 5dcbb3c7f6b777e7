"""Alpaca-like pairs: ``{instruction, input, chosen, rejected}``; an ``output`` beside them is not read."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.core.records import Example, Provenance
from preftune.data.formats.alpaca import instruction_of
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, text_pair
from preftune.data.formats.turns import assistant, text_field, user


@formats.register("alpaca-preference")
@dataclass(frozen=True, slots=True)
class AlpacaPreference:
    """Pairs; the prompt is the instruction and, after an empty line, the input where there is one.

    With ``style="text"`` an empty line also parts the prompt from the completion.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has instruction, chosen and rejected."""
        return has(row, "instruction", "chosen", "rejected")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        prompt, chosen, rejected = instruction_of(row), text_field(row, "chosen"), text_field(row, "rejected")
        if self.style == "text":
            return text_pair(f"{prompt}\n\n", chosen, rejected, provenance)
        names = ("instruction", "chosen", "rejected")
        return chat_pair(user(prompt), assistant(chosen), assistant(rejected), provenance, names=names)
