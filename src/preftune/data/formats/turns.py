"""Conversations in rows: reading messages and checking that they make sense.

Fields of a message that are kept: role (``developer`` is ``system``), content (a list of text parts is joined), name,
tool_calls, tool_call_id, reasoning_content. Others are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from preftune.core.errors import BadRow
from preftune.core.records import ROLES, Message, Messages, Role
from preftune.data.sources.base import kind_of


def text_field(row: Mapping[str, Any], field: str) -> str:
    """A field that must hold text."""
    if row.get(field) is None:
        raise BadRow("missing_field", f"{field} is missing", field=field)
    value = row[field]
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected text", field=field)
    return value


def number_field(row: Mapping[str, Any], field: str, low: float, high: float) -> float | None:
    """A field that holds a number in a range, or None where it is absent; text of a number is taken too."""
    value = row.get(field)
    if value is None or value == "":
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise BadRow("wrong_type", f"{field} is {value!r}, expected a number from {low:g} to {high:g}", field=field)
    return number


def turns(value: Any, field: str) -> Messages:
    """A list of messages."""
    if value is None:
        raise BadRow("missing_field", f"{field} is missing", field=field)
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected a list of messages", field=field)
    return tuple(_turn(one, f"{field}.{place}") for place, one in enumerate(value))


def _turn(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected a message with role and content", field=field)
    role = value.get("role")
    if role is None:
        raise BadRow("missing_field", f"{field}.role is missing", field=f"{field}.role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        raise BadRow("unknown_role", f"{field}.role is {shown}; there is developer, {', '.join(ROLES)}", field=f"{field}.role")
    for foreign in ("audio", "images"):
        if value.get(foreign):
            raise BadRow("vision_or_audio", f"{field}.{foreign}: only text is trained", field=f"{field}.{foreign}")
    if value.get("function_call"):
        raise BadRow("unsupported_field", f"{field}.function_call: write tool_calls instead", field=f"{field}.function_call")
    calls = _mappings(value.get("tool_calls"), f"{field}.tool_calls")
    content = _content(value.get("content"), f"{field}.content", may_be_empty=bool(calls) or role in {"system", "tool"})
    others: dict[str, str | None] = {}
    for key in ("name", "tool_call_id", "reasoning_content"):
        others[key] = value.get(key)
        if others[key] is not None and not isinstance(others[key], str):
            raise BadRow("wrong_type", f"{field}.{key} is {kind_of(others[key])}, expected text", field=f"{field}.{key}")
    return Message(cast(Role, role), content, calls, **others)


def _content(value: Any, field: str, *, may_be_empty: bool) -> str:
    if value is None and may_be_empty:
        return ""
    if value is None:
        raise BadRow("missing_field", f"{field} is missing", field=field)
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected text", field=field)
    return "".join(_part(part, f"{field}.{place}") for place, part in enumerate(value))


def _part(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected a part with type and text", field=field)
    kind = value.get("type", "text")
    if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file")):
        raise BadRow("vision_or_audio", f"{field} is of type {kind}; only text is trained", field=field)
    if kind not in {"text", "input_text", "output_text"} or not isinstance(value.get("text"), str):
        raise BadRow("wrong_type", f"{field} is no part of type text with a text", field=field)
    return cast(str, value["text"])


def tools_of(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas, as a list or as the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise BadRow("wrong_type", f"{field} is text but no JSON list of tools", field=field) from None
    return _mappings(value, field)


def _mappings(value: Any, field: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Mapping) for one in value):
        raise BadRow("wrong_type", f"{field} is {kind_of(value)}, expected a list of objects", field=field)
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise BadRow("wrong_type", f"{field} holds values that JSON has not", field=field) from None
    return tuple(value)


def check_prompt(prompt: Messages, field: str) -> None:
    """A prompt has at least one turn, no empty one (a system or tool turn may be), and ends before an assistant's."""
    if not prompt or not any(message.content.strip() for message in prompt):
        raise BadRow("empty_prompt", f"{field} is empty", field=field)
    _check_contents(prompt, field, "empty_content")
    _check_order(prompt, field)
    if prompt[-1].role == "assistant":
        raise BadRow("roles_do_not_alternate", f"{field} ends in an assistant turn", field=field)


def check_completion(prompt: Messages, completion: Messages, field: str) -> None:
    """A completion starts and ends with an assistant turn, and says something."""
    if not completion:
        raise BadRow("empty_completion", f"{field} is empty", field=field)
    if completion[0].role != "assistant":
        raise BadRow("no_assistant_turn", f"{field} begins with a {completion[0].role} turn, expected assistant", field=field)
    if completion[-1].role != "assistant":
        reason = "does_not_end_in_assistant"
        raise BadRow(reason, f"{field} ends in a {completion[-1].role} turn, expected assistant", field=field)
    _check_contents(completion, field, "empty_completion")
    _check_order((*prompt[-1:], *completion), field, first=-len(prompt[-1:]))


def _check_contents(messages: Sequence[Message], field: str, reason: str) -> None:
    for place, message in enumerate(messages):
        if not message.content.strip() and not message.tool_calls and message.role not in {"system", "tool"}:
            at = field if len(messages) == 1 else f"{field}.{place}"
            raise BadRow(reason, f"{at} is an empty {message.role} turn", field=field)


def _check_order(messages: Sequence[Message], field: str, first: int = 0) -> None:
    for place in range(1, len(messages)):
        role = messages[place].role
        if role == messages[place - 1].role and role != "tool":
            raise BadRow("roles_do_not_alternate", f"{field}: turn {place + first} is a second {role} turn in a row", field=field)


def user(text: str) -> Messages:
    """Text as one user turn."""
    return (Message("user", text),)


def assistant(text: str) -> Messages:
    """Text as one assistant turn."""
    return (Message("assistant", text),)


SHAREGPT: Mapping[str, str] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "assistant": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def sharegpt_turns(value: Any, field: str) -> Messages:
    """ShareGPT's turns ``{from, value}`` (one of them, or a list) as messages; ``{role, content}`` are taken too."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return turns(value, field)
    renamed = []
    for place, one in enumerate(value):
        if isinstance(one, Mapping) and "from" in one:
            name = one.get("from")
            role = SHAREGPT.get(name) if isinstance(name, str) else None
            if role is None:
                shown = repr(name) if isinstance(name, str) else kind_of(name)
                raise BadRow(
                    "unknown_role",
                    f"{field}.{place}.from is {shown}; there is {', '.join(SHAREGPT)}",
                    field=f"{field}.{place}.from",
                )
            kept = {key: one[key] for key in ("tool_calls", "name") if key in one}
            renamed.append({"role": role, "content": one.get("value"), **kept})
        else:
            renamed.append(one)
    return turns(renamed, field)
