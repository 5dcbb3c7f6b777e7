"""Records as clients see them, where several dialects agree; and pages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from starlette.responses import StreamingResponse

from preftune.store.base import Page, R
from preftune.store.records import File

_FILE_STATUS = {
    "pending": "uploaded",
    "uploaded": "uploaded",
    "processing": "uploaded",
    "processed": "processed",
    "error": "error",
}
_PROCESSING = {
    "pending": "PENDING", "uploaded": "QUEUED", "processing": "RUNNING", "processed": "COMPLETED", "error": "INVALID_FORMAT",
}  # fmt: skip

# SeekrFlow's words for training data, which the other clients' packages refuse to read
TRAINING = frozenset({"preference-fine-tune", "reinforcement-fine-tune", "pre-train", "alignment"})


def seconds(time: datetime | None) -> int | None:
    """A time as whole unix seconds."""
    return None if time is None else int(time.timestamp())


def zulu(time: datetime | None) -> str | None:
    """A time as ISO 8601 with a Z, the only form that Together's command line can read.

    >>> from datetime import UTC
    >>> zulu(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    '2026-01-02T03:04:05Z'
    """
    return None if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ")


def file_object(file: File) -> dict[str, Any]:
    """A file for ``/v1/files``: one object that is valid for OpenAI's and Together's clients in strict mode."""
    suffix = next((end for end in ("parquet", "csv", "json") if f".{end}" in file.filename.lower()), "jsonl")
    suffix = "jsonl" if ".jsonl" in file.filename.lower() else suffix
    report = dict(file.report)
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": seconds(file.created_at),
        "filename": file.filename,
        "purpose": "fine-tune" if file.purpose in TRAINING else file.purpose,
        "status": _FILE_STATUS[file.status],
        "status_details": report.get("error"),
        "expires_at": seconds(file.expires_at),
        "FileType": suffix,
        "processing_status": _PROCESSING[file.status],
        "validation_report": {**report, "file_id": file.id, "dataset_format": file.format, "nlines": file.num_rows}
        if report
        else None,
        "Processed": file.status == "processed",
        "LineCount": file.num_rows or 0,
    }


def cursor_page(page: Page[R], show: Callable[[R], dict[str, Any]]) -> dict[str, Any]:
    """A page in OpenAI's form."""
    rows: Sequence[dict[str, Any]] = [show(one) for one in page.items]
    return {
        "object": "list",
        "data": rows,
        "has_more": page.has_more,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
    }


def whole_list(rows: Iterable[dict[str, Any]], *, has_cursor: bool = False) -> StreamingResponse:
    """A list without pages, written while it is read: memory does not grow with its length.

    has_cursor: behind it what ``cursor_page`` says of a page: this one is the last.
    """

    def chunks() -> Iterator[bytes]:
        left, sign = iter(rows), ""
        ends: tuple[str | None, str | None] = (None, None)
        yield b'{"object":"list","data":['
        while some := list(islice(left, 100)):
            yield (sign + ",".join(json.dumps(row, separators=(",", ":"), allow_nan=False) for row in some)).encode()
            sign, ends = ",", (ends[0] or some[0].get("id"), some[-1].get("id"))
        behind = {"has_more": False, "first_id": ends[0], "last_id": ends[1]} if has_cursor else {}
        yield b"]" + "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in behind.items()).encode() + b"}"

    return StreamingResponse(chunks(), media_type="application/json")
