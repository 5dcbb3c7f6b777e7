"""Answers as values: JSON to a typed thing, lines of a stream to events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from preftune.core import api
from preftune.core.errors import InputError
from preftune.sdk.errors import ApiError

T = TypeVar("T")
CHUNK = 1 << 20


def read(content: bytes, kind: type[T], url: str) -> T:
    """The answer as a value.

    Raises
        ApiError: it is not what a preftune server answers with.
    """
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ApiError(f"{url} did not answer as a preftune server of this version does: {first['msg']}") from None


def json_of(content: bytes) -> Any:
    """JSON, or None where it is none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


class EventLines:
    """Server-sent events from their lines; ``end`` is set when the server says that no more will come."""

    def __init__(self) -> None:
        self.last = ""
        self.end = False
        self._name = ""

    def take(self, line: str) -> api.Event | None:
        """The event that a line completes, if it does."""
        if line.startswith("event:"):
            self._name = line[6:].strip()
        elif line.startswith("data:"):
            text = line[5:].strip()
            if text == "[DONE]" or self._name == "end":
                self.end = True
                return None
            event = api.Event.model_validate_json(text)
            self.last = event.id
            return event
        elif not line:
            self._name = ""
        return None


def delta_of(line: str) -> str:
    """The text that a line of a chat's stream adds.

    Raises
        ApiError: the model failed on the way.
    """
    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
        return ""
    row: Mapping[str, Any] = json.loads(line[5:])
    if "error" in row:
        raise ApiError(str(row["error"].get("message")), code=row["error"].get("code"), type=str(row["error"].get("type")))
    return "".join(choice["delta"].get("content") or "" for choice in row["choices"] if choice["index"] == 0)


def size_of(path: Path) -> int:
    """Bytes of a file to upload; InputError where there is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    return path.stat().st_size
