"""CSV with a header line; every value is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from preftune.core.errors import InputError
from preftune.data.sources.base import BOM, MAX_ROW_BYTES, Row, UnreadableRow, excerpt_of, one_line, reading, sources


@sources.register("csv")
@dataclass(frozen=True, slots=True)
class CsvFile:
    """Reads ``.csv`` and ``.tsv`` files (also .gz, .zst); the number of a row is the line on which it ends."""

    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv")
    max_row_bytes: int = MAX_ROW_BYTES

    def rows(self, path: Path) -> Iterator[tuple[int, Row | UnreadableRow]]:
        """Line number and fields of every row that is not blank."""
        csv.field_size_limit(self.max_row_bytes)  # the module's own limit of 128 KiB is shorter than long answers
        with reading(path) as file:
            reader = csv.reader(self._lines(file, path), delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
            try:
                header = next(reader, [])
                if not any(name.strip() for name in header):
                    raise InputError(f"{path} line 1: no column names")
                for values in reader:
                    if values:
                        yield reader.line_num, _row(header, values)
            except csv.Error as error:
                raise InputError(f"{path} line {reader.line_num} is not CSV: {one_line(error)}") from None

    def _lines(self, file: IO[bytes], path: Path) -> Iterator[str]:
        number = 0
        while line := file.readline(self.max_row_bytes + 1):
            number += 1
            if len(line) > self.max_row_bytes:
                raise InputError(f"{path} line {number}: longer than {self.max_row_bytes >> 20} MiB, the limit for a row")
            if number == 1:
                line = line.removeprefix(BOM)
            # Bytes that are not UTF-8 become lone surrogates, which mark the row that holds them.
            yield line.decode("utf-8", "surrogateescape")


def _row(header: list[str], values: list[str]) -> Row | UnreadableRow:
    if len(values) != len(header):
        detail = f"{len(values)} values for {len(header)} columns"
        return UnreadableRow("wrong_columns", detail, excerpt=excerpt_of(values))
    for name, value in zip(header, values, strict=True):
        if not value.isascii() and any("\udc80" <= letter <= "\udcff" for letter in value):
            return UnreadableRow(
                "invalid_utf8", f"column {name!r} holds bytes that are not UTF-8", field=name, excerpt=excerpt_of(values)
            )
    return dict(zip(header, values, strict=True))
