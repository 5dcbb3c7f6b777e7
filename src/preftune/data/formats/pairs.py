"""What every preference format ends in: two checked completions that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.core.errors import BadRow
from preftune.core.ids import digest_json
from preftune.core.records import (
    Demonstration,
    Desirability,
    Example,
    Message,
    Messages,
    Preference,
    PreferencePair,
    Provenance,
    Ranking,
    pair_of,
)
from preftune.data.formats.base import CannotHold, Style
from preftune.data.formats.turns import check_completion, check_prompt

FIRST = Preference("first")


def text_pair(prompt: str, chosen: str, rejected: str, provenance: Provenance, judgement: Preference = FIRST) -> Example:
    """Two raw texts after a raw prompt: nothing is put between prompt and completion."""
    if not prompt:
        raise BadRow("empty_prompt", "prompt is empty", field="prompt")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow("empty_completion", f"{field} is empty", field=field)
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same", field="rejected")
    completions = ((Message("assistant", chosen),), (Message("assistant", rejected),))
    return Example((Message("user", prompt),), completions, judgement, provenance, "text")


def chat_pair(
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    provenance: Provenance,
    *,
    tools: tuple[Mapping[str, Any], ...] = (),
    names: tuple[str, str, str] = ("prompt", "chosen", "rejected"),
    judgement: Preference = FIRST,
) -> Example:
    """Two completions of a conversation; ``names`` are the row's fields, for messages."""
    check_prompt(prompt, names[0])
    check_completion(prompt, chosen, names[1])
    check_completion(prompt, rejected, names[2])
    if chosen == rejected:
        raise BadRow("identical", f"{names[1]} and {names[2]} are the same", field=names[2])
    return Example(prompt, (chosen, rejected), judgement, provenance, "chat", tools)


def chat_ranking(
    prompt: Messages, completions: Sequence[Messages], ranks: Sequence[int], provenance: Provenance, *, names: tuple[str, str]
) -> Example:
    """Several completions of a conversation with their ranks, 1 = best; equal ones are kept once, at their best rank."""
    check_prompt(prompt, names[0])
    best: dict[str, int] = {}
    kept: dict[str, Messages] = {}
    for place, (completion, rank) in enumerate(zip(completions, ranks, strict=True)):
        check_completion(prompt, completion, f"{names[1]}.{place}")
        key = digest_json([message.to_dict() for message in completion])
        best[key] = min(rank, best.get(key, rank))
        kept.setdefault(key, completion)
    if len(best) < 2:
        raise BadRow("too_few_completions", f"{names[1]} holds fewer than two different completions", field=names[1])
    return Example(prompt, tuple(kept.values()), Ranking(tuple(best.values())), provenance, "chat")


def chat_unpaired(
    prompt: Messages,
    completion: Messages,
    is_desirable: bool,
    provenance: Provenance,
    *,
    tools: tuple[Mapping[str, Any], ...] = (),
    names: tuple[str, str] = ("prompt", "completion"),
) -> Example:
    """One completion of a conversation that is desirable or not."""
    check_prompt(prompt, names[0])
    check_completion(prompt, completion, names[1])
    return Example(prompt, (completion,), Desirability(is_desirable), provenance, "chat", tools)


def strength_of(value: float, scale: float = 1.0) -> float:
    """A difference of scores as a strength of 0 to 3.

    >>> strength_of(-2), strength_of(9, scale=3), strength_of(12, scale=3)
    (2.0, 3.0, 3.0)
    """
    return min(3.0, abs(float(value)) / scale)


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


def decisive_pair(example: Example) -> PreferencePair:
    """The pair of an example for a format that holds nothing else.

    Raises
        CannotHold: a tie, a demonstration, an unpaired label, or a ranking (which is several pairs).
    """
    pair = pair_of(example)
    if pair is None:
        judgement = example.judgement
        if isinstance(judgement, Preference) and judgement.preferred == "tie":
            raise CannotHold("tie", "the format has no place for a tie")
        kind = type(judgement).__name__.lower()
        raise CannotHold(kind, f"the format holds pairs, and the row is a {kind}")
    return pair


def written_pair(example: Example, names: tuple[str, str, str] = ("prompt", "chosen", "rejected")) -> dict[str, Any]:
    """A pair as prompt, chosen and rejected: texts for raw text, lists of messages for conversations."""
    pair = decisive_pair(example)
    sides = (pair.prompt, pair.chosen, pair.rejected)
    row: dict[str, Any] = {
        name: side[0].content if example.style == "text" else rows_of(side) for name, side in zip(names, sides, strict=True)
    }
    if example.tools:
        row["tools"] = [dict(tool) for tool in example.tools]
    return row


def no_tools(example: Example) -> None:
    """CannotHold for rows with tool schemas, where a format has no place for them."""
    if example.tools:
        raise CannotHold("tools", "the format has no place for tools; convert to trl-preference instead")


def conversation_only(example: Example) -> None:
    """CannotHold for raw text, where a format holds conversations."""
    if example.style == "text":
        raise CannotHold("raw_text", "the format holds conversations, and the row is raw text; read it with --style chat")


def rows_of(messages: Messages) -> list[dict[str, Any]]:
    """Messages as plain mappings."""
    return [message.to_dict() for message in messages]


def plain_text(messages: Messages, what: str) -> str:
    """The text of one turn without more to it.

    Raises
        CannotHold: several turns, or tool calls.
    """
    if len(messages) != 1:
        raise CannotHold("several_turns", f"the format has one text for the {what}, and it has {len(messages)} turns")
    if len(messages[0].to_dict()) > 2:
        raise CannotHold("tool_calls", f"the format has no place for more than the text of the {what}")
    return messages[0].content


def refuse_text(style: Style | None) -> None:
    """Conversations cannot be read as raw text."""
    if style == "text":
        raise BadRow("no_text_style", "the row is a conversation; leave out style: text")
