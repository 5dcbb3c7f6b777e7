"""JSON: a list of objects (read as a stream), or one object that holds such a list."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from preftune.core.errors import InputError
from preftune.data.sources.base import MAX_ROW_BYTES, Row, UnreadableRow, check_row, one_line, reading, sources

BLOCK_BYTES = 1 << 20
MAX_BLOCK_BYTES = 8 << 20
MAX_OBJECT_BYTES = 64 << 20
"""Largest file that holds one object: such a file cannot be streamed."""

_BLANKS = re.compile(r"[ \t\r\n]*")


@sources.register("json")
@dataclass(frozen=True, slots=True)
class JsonFile:
    """Reads ``.json`` files (also .gz, .zst); the number of a row is its place in the list."""

    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    max_row_bytes: int = MAX_ROW_BYTES

    def rows(self, path: Path) -> Iterator[tuple[int, Row | UnreadableRow]]:
        """Place and object of every element."""
        with reading(path) as file:
            stream = _Stream(file, path, self.max_row_bytes)
            values = stream.elements() if stream.opening() == "[" else iter(_rows_of_object(stream.whole(), path))
            for number, value in enumerate(values, start=1):
                yield number, check_row(value)


class _Stream:
    """A JSON text that is decoded piece by piece; holds one element and one block at most."""

    def __init__(self, file: IO[bytes], path: Path, max_characters: int) -> None:
        self._file = file
        self._path = path
        self._max_characters = max_characters
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._bytes = 0
        self._line = 1
        self._is_at_end = False

    def opening(self) -> str:
        """``[`` or ``{``: how the text begins, byte-order marks aside."""
        while (found := self.peek()) == "\ufeff":
            self._at += 1
        if found not in {"[", "{"}:
            raise self._error(f"begins with {found!r}, expected a list or an object")
        return found

    def peek(self) -> str:
        """The next character that is not blank, or an empty string at the end."""
        while True:
            match = _BLANKS.match(self._text, self._at)
            end = match.end() if match else self._at
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self._take("[")
        is_first = True
        while self.peek() != "]":
            if not is_first:
                self._take(",")
            is_first = False
            self.peek()
            yield self._element()
        self._take("]")
        if self.peek():
            raise self._error("there is more after the list")

    def whole(self) -> Any:
        """The whole text as one value."""
        while self._more():
            if self._bytes > MAX_OBJECT_BYTES:
                raise InputError(
                    f"{self._path} is one JSON object of more than {MAX_OBJECT_BYTES >> 20} MiB; write its rows as JSON Lines"
                )
        try:
            return json.loads(self._text)
        except json.JSONDecodeError as error:
            raise InputError(f"{self._path} is not JSON: line {error.lineno} column {error.colno}: {error.msg}") from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"{self._path} is not JSON: {one_line(error)}") from None

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError, ValueError) as error:
                waiting = len(self._text) - self._at
                if waiting <= self._max_characters and self._more():
                    continue
                if waiting > self._max_characters:
                    limit = f"longer than {self._max_characters >> 20} MiB, the limit for a row"
                    raise self._error(f"an element that is broken or {limit}") from None
                raise self._error(_message(error)) from None
            # A number may go on in the next block; anything else ends where it ends.
            if end == len(self._text) and self._more():
                continue
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def _take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            raise self._error(f"expected {wanted!r}, found {found!r}" if found else f"ends before {wanted!r}: the file is cut")
        self._at += 1

    def _more(self) -> bool:
        """Read another block, as long as what waits already (few retries for long rows); False at the end of the file."""
        if self._is_at_end:
            return False
        block = self._file.read(min(max(BLOCK_BYTES, len(self._text) - self._at), MAX_BLOCK_BYTES))
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is not UTF-8: {error.reason} at about byte {self._bytes + error.start}") from None
        self._bytes += len(block)
        self._is_at_end = not block
        self._text = self._text[self._at :] + text
        self._at = 0
        return bool(block)

    def _error(self, why: str) -> InputError:
        return InputError(f"{self._path} is not JSON: line {self._line}: {why}")


def _message(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply to be read" if isinstance(error, RecursionError) else one_line(error)


def _rows_of_object(value: Any, path: Path) -> list[Any]:
    """The rows in an object: its only list of objects, or the object itself."""
    if not isinstance(value, dict):
        return [value]
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and all(map(_is_row, rows))}
    if not lists:
        return [value]
    if len(lists) > 1:
        raise InputError(f"{path} holds several lists ({', '.join(sorted(lists))}); write the rows of one as JSON Lines")
    return next(iter(lists.values()))


def _is_row(value: Any) -> bool:
    """An object that is no turn of a conversation: ``{"messages": [...]}`` alone is a row, not a file of rows."""
    return isinstance(value, dict) and not {"role", "content"} <= value.keys() and "function" not in value
