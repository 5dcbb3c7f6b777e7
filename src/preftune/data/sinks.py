"""Rows to a file: the container by its ending, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from preftune.core.errors import InputError, UsageError
from preftune.core.files import replacing

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
ROWS_PER_GROUP = 1000


def sink_suffix(path: Path) -> str:
    """The container that an ending means.

    Raises
        UsageError: an ending that is not written.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in {".gz", ".zst"} else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in SUFFIXES or (packed and suffix == ".parquet"):
        raise UsageError(f"{path}: rows are written to {', '.join(SUFFIXES)} (the text ones also .gz or .zst); change the ending")
    return suffix


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows to a file in constant memory (Parquet: a group of rows at a time); their number.

    Raises
        UsageError: an ending that is not written. InputError: rows that the container cannot hold.
    """
    suffix = sink_suffix(path)
    writers: dict[str, Callable[[IO[bytes], Iterator[Mapping[str, Any]]], None]] = {
        ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet,
    }  # fmt: skip
    counted = _Counted(rows)
    with replacing(path) as raw, ExitStack() as stack:
        writers[suffix](stack.enter_context(_packed(path, raw)), iter(counted))
    return counted.number


class _Counted:
    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.number = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self._rows:
            self.number += 1
            yield row


@contextmanager
def _packed(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    ending = path.suffix.lower()
    if ending == ".gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif ending == ".zst":
        try:
            import zstandard
        except ImportError:
            raise InputError(f"{path}: .zst needs the package zstandard; pip install 'preftune[zstd]'") from None
        with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as packed:
            yield cast(IO[bytes], packed)
    else:
        yield raw


def _jsonl(file: IO[bytes], rows: Iterator[Mapping[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _json(file: IO[bytes], rows: Iterator[Mapping[str, Any]]) -> None:
    file.write(b"[")
    for place, row in enumerate(rows):
        file.write((b",\n" if place else b"\n") + json.dumps(row, ensure_ascii=False).encode())
    file.write(b"\n]\n")


def _csv(file: IO[bytes], rows: Iterator[Mapping[str, Any]]) -> None:
    """CSV holds texts; a row with lists or objects has no place in it."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (list, dict)):
                raise InputError(f"CSV has no place for {name}, which is a list or an object; write .jsonl or .parquet")
        if writer is None:
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
        if list(row) != list(writer.fieldnames):
            raise InputError("CSV has one set of columns for all rows, and these differ; write .jsonl")
        writer.writerow(row)
    text.detach()


def _parquet(file: IO[bytes], rows: Iterator[Mapping[str, Any]]) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]  # it ships no types
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # it ships no types

    kept = [dict(row) for row in rows]  # the columns' types follow from all rows: tools or an empty list may come last
    try:
        table = pa.Table.from_pylist(kept)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"Parquet has one type for each column, and these rows differ: {str(error).splitlines()[0]}") from None
    pq.write_table(table, file, row_group_size=ROWS_PER_GROUP)
