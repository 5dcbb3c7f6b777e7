"""Alpaca's SFT rows: ``{instruction, input, output}``."""

from __future__ import annotations

from dataclasses import dataclass

from preftune.core.errors import BadRow
from preftune.core.records import Example, Provenance
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_demonstration, text_demonstration
from preftune.data.formats.turns import assistant, text_field, user


@formats.register("alpaca")
@dataclass(frozen=True, slots=True)
class Alpaca:
    """Demonstrations; the prompt is the instruction and, after an empty line, the input where there is one.

    With ``style="text"`` an empty line also parts the prompt from the completion.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has instruction and output, and no pair."""
        return has(row, "instruction", "output") and not any(has(row, key) for key in ("chosen", "rejected", "kto_tag"))

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The demonstration in a row."""
        prompt, output = instruction_of(row), text_field(row, "output")
        if self.style == "text":
            return text_demonstration(f"{prompt}\n\n", output, provenance, "output")
        return chat_demonstration(user(prompt), assistant(output), provenance, names=("instruction", "output"))


def instruction_of(row: Row) -> str:
    """Instruction and input as one prompt."""
    instruction = text_field(row, "instruction")
    context = text_field(row, "input") if row.get("input") is not None else ""
    if not instruction.strip() and not context.strip():
        raise BadRow("empty_prompt", "instruction is empty", field="instruction")
    return "\n\n".join(part for part in (instruction, context) if part.strip())
