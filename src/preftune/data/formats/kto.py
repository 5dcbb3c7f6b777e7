"""Completions that are desirable or not: TRL's ``{prompt, completion, label}`` and LLaMA-Factory's ``label`` and ``kto_tag``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Desirability, Example, Message, Provenance, unpaired_of
from preftune.data.formats.alpaca import instruction_of
from preftune.data.formats.base import CannotHold, Row, Style, formats, has
from preftune.data.formats.llamafactory import with_system
from preftune.data.formats.pairs import chat_unpaired, refuse_text, rows_of
from preftune.data.formats.turns import assistant, sharegpt_turns, text_field, tools_of, turns, user
from preftune.data.sources.base import kind_of

_TRUE, _FALSE = frozenset({True, "true", "True", "1"}), frozenset({False, "false", "False", "0"})


@formats.register("trl-unpaired")
@dataclass(frozen=True, slots=True)
class TrlUnpaired:
    """TRL's unpaired preference type: texts (trained as raw text) or lists of messages, and a label."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has prompt, completion and label."""
        return has(row, "prompt", "completion", "label")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The labelled completion in a row."""
        for field in ("prompt", "completion"):
            if row.get(field) is None:
                raise BadRow("missing_field", f"{field} is missing", field=field)
        label = _label(row, "label")
        lists = [isinstance(row[field], (list, tuple)) for field in ("prompt", "completion")]
        if not any(lists) and self.style != "chat":
            prompt, completion = text_field(row, "prompt"), text_field(row, "completion")
            if not prompt:
                raise BadRow("empty_prompt", "prompt is empty", field="prompt")
            if not completion.strip():
                raise BadRow("empty_completion", "completion is empty", field="completion")
            messages = (Message("user", prompt),), ((Message("assistant", completion),),)
            return Example(*messages, Desirability(label), provenance, "text")
        if any(lists):
            refuse_text(self.style)
        question = turns(row["prompt"], "prompt") if lists[0] else user(text_field(row, "prompt"))
        answer = turns(row["completion"], "completion") if lists[1] else assistant(text_field(row, "completion"))
        return chat_unpaired(question, answer, label, provenance, tools=tools_of(row.get("tools"), "tools"))

    def write(self, example: Example) -> dict[str, Any]:
        """The row of one labelled completion; a pair is two of them, which no single row holds."""
        found = unpaired_of(example)
        if len(found) != 1:
            raise CannotHold("not_unpaired", "the format holds one labelled completion, and the row is none")
        (completion, label), *_ = found
        if example.style == "text":
            return {"prompt": example.prompt[0].content, "completion": completion[0].content, "label": label}
        row: dict[str, Any] = {"prompt": rows_of(example.prompt), "completion": rows_of(completion), "label": label}
        if example.tools:
            row["tools"] = [dict(tool) for tool in example.tools]
        return row


@formats.register("llamafactory-kto")
@dataclass(frozen=True, slots=True)
class LlamaFactoryKto:
    """Conversations that end in the labelled answer, or instruction, input and output; ``kto_tag`` or ``label`` says which."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has a tag, and a conversation or an instruction with its output."""
        is_tagged = has(row, "kto_tag") or has(row, "label")
        return is_tagged and (has(row, "messages") or has(row, "conversations") or has(row, "instruction", "output"))

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The labelled completion in a row."""
        refuse_text(self.style)
        label = _label(row, "kto_tag" if row.get("kto_tag") is not None else "label")
        if row.get("instruction") is not None:
            prompt = with_system(row, user(instruction_of(row)))
            return chat_unpaired(prompt, assistant(text_field(row, "output")), label, provenance, names=("instruction", "output"))
        field = "messages" if row.get("messages") is not None else "conversations"
        messages = sharegpt_turns(row.get(field), field)
        if not messages or messages[-1].role != "assistant":
            raise BadRow(
                "does_not_end_in_assistant", f"{field} does not end in an assistant turn, which the tag is about", field=field
            )
        tools = tools_of(row.get("tools") or None, "tools")
        return chat_unpaired(with_system(row, messages[:-1]), messages[-1:], label, provenance, tools=tools, names=(field, field))


def _label(row: Row, field: str) -> bool:
    value = row.get(field)
    if value is None:
        raise BadRow("missing_field", f"{field} is missing", field=field)
    if isinstance(value, (bool, int, str)):
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
    shown = repr(value) if isinstance(value, str) else kind_of(value)
    raise BadRow("wrong_label", f"{field} is {shown}, expected true or false", field=field)
