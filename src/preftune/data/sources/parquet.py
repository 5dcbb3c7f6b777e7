"""Parquet, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from preftune.core.errors import InputError
from preftune.data.sources.base import Row, UnreadableRow, check_row, one_line, reading, sources


@sources.register("parquet")
@dataclass(frozen=True, slots=True)
class ParquetFile:
    """Reads ``.parquet`` files; at most ``rows_per_batch`` rows are held as Python values."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    rows_per_batch: int = 256

    def rows(self, path: Path) -> Iterator[tuple[int, Row | UnreadableRow]]:
        """Row number and fields of every row."""
        import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
        import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types

        with reading(path) as file:
            number = 0
            try:
                table = pq.ParquetFile(file)
                for batch in table.iter_batches(batch_size=self.rows_per_batch):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, check_row(row)
            except (pa.ArrowException, ValueError, TypeError) as error:
                raise InputError(f"{path} is no readable Parquet file: {one_line(error)}") from None
