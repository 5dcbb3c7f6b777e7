"""JSON Lines: one object a line, split at the newline byte only (U+2028 may stand inside a row)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from preftune.core.errors import InputError
from preftune.data.sources.base import BOM, MAX_ROW_BYTES, Row, UnreadableRow, excerpt_of, parse_row, reading, sources


@sources.register("jsonl")
@dataclass(frozen=True, slots=True)
class JsonLines:
    """Reads ``.jsonl`` files (also .gz, .zst) line by line; no line longer than ``max_row_bytes`` is held."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")
    max_row_bytes: int = MAX_ROW_BYTES

    def rows(self, path: Path) -> Iterator[tuple[int, Row | UnreadableRow]]:
        """Line number and object of every line that is not blank."""
        number = offset = 0
        with reading(path) as file:
            while line := file.readline(self.max_row_bytes + 1):
                number += 1
                start, offset = offset, offset + len(line)
                if len(line) > self.max_row_bytes and not line.endswith(b"\n"):
                    limit = f"longer than {self.max_row_bytes >> 20} MiB, the limit for a row"
                    if number == 1:
                        raise InputError(f"{path} line 1: {limit}; JSON Lines hold one object a line")
                    offset += _skip_line(file)
                    yield number, UnreadableRow("row_too_long", limit, excerpt=excerpt_of(line[:999].decode("utf-8", "replace")))
                    continue
                while number == 1 and line.startswith(BOM):
                    line, start = line[len(BOM) :], start + len(BOM)
                if line.strip():
                    yield number, parse_row(line, start)


def _skip_line(file: IO[bytes]) -> int:
    """Go to the end of the line; the number of bytes passed."""
    passed = 0
    while part := file.readline(1 << 20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed
