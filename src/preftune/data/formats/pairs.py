"""What every preference format ends in: two checked completions that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.records import Demonstration, Example, Message, Messages, Preference, Provenance
from preftune.data.formats.base import Style
from preftune.data.formats.turns import check_completion, check_prompt


def text_pair(prompt: str, chosen: str, rejected: str, provenance: Provenance) -> Example:
    """A pair of raw texts: nothing is put between prompt and completion."""
    if not prompt:
        raise BadRow("empty_prompt", "prompt is empty", field="prompt")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty_completion", f"{field} is empty", field=field)
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same", field="rejected")
    completions = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    return Example((Message("user", prompt),), completions, Preference("first"), provenance, "text")


def chat_pair(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    provenance: Provenance,
    *,
    tools: tuple[Mapping[str, Any], ...] = (),
    names: tuple[str, str, str] = ("prompt", "chosen", "rejected"),
) -> Example:
    """A pair of conversations; ``names`` are the row's fields, for messages."""
    check_prompt(prompt, names[0])
    check_completion(prompt, chosen, names[1])
    check_completion(prompt, rejected, names[2])
    if chosen == rejected:
        raise BadRow("identical", f"{names[1]} and {names[2]} are the same", field=names[2])
    return Example(prompt, (chosen, rejected), Preference("first"), provenance, "chat", tools)


def text_demonstration(prompt: str, completion: str, provenance: Provenance, field: str) -> Example:
    """A raw text to imitate after a raw prompt."""
    if not prompt:
        raise BadRow("empty_prompt", "prompt is empty", field="prompt")
    if not completion.strip():
        raise BadRow("empty_completion", f"{field} is empty", field=field)
    return Example((Message("user", prompt),), ((Message("assistant", completion),),), Demonstration(), provenance, "text")


def chat_demonstration(
    prompt: Messages,
    completion: Messages,
    provenance: Provenance,
    *,
    tools: tuple[Mapping[str, Any], ...] = (),
    names: tuple[str, str] = ("prompt", "completion"),
) -> Example:
    """Turns to imitate after a conversation."""
    check_prompt(prompt, names[0])
    check_completion(prompt, completion, names[1])
    return Example(prompt, (completion,), Demonstration(), provenance, "chat", tools)


def refuse_text(style: Style | None) -> None:
    """Conversations cannot be read as raw text."""
    if style == "text":
        raise BadRow("no_text_style", "the row is a conversation; leave out style: text")
