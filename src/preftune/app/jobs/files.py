"""Uploaded files: kept, validated by a job of their own, deleted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preftune.app.jobs.platform import MAX_UPLOAD, Platform
from preftune.app.jobs.states import WrongState, active_jobs
from preftune.core.errors import InputError
from preftune.store.records import File, Job, new_id, now

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
COMPRESSED = ("", ".gz", ".zst")
MAX_REPORTED = 20
MAX_ANNOTATORS = 1000
FREE_UNPACKED, MAX_RATIO = 64 << 20, 100
CHUNK = 1 << 20
ROWS_AT_ONCE, BYTES_A_ROW = 4096, 64  # of a table that is looked into; a row of nothing takes room too
# files that no job trains on: rows to evaluate, batches, attachments
OTHER_PURPOSES = frozenset({"eval", "evals", "batch", "batch-api", "user_data", "assistants", "vision", "calibration", "result"})


def suffix_of(filename: str) -> str:
    """The ending that says how a file is read, such as ``.jsonl.gz``.

    Raises
        InputError: no ending that is read.

    >>> suffix_of("a.b.JSONL.gz")
    '.jsonl.gz'
    """
    name = filename.lower()
    for suffix in SUFFIXES:
        for packed in COMPRESSED:
            if name.endswith(suffix + packed):
                return suffix + packed
    raise InputError(
        f"file {filename!r}: the ending is none of {', '.join(SUFFIXES)} (each also .gz or .zst); rename or convert it"
    )


def clean_name(filename: str) -> str:
    """The last part of a path, which is all that is kept of what a client calls its file.

    Raises
        InputError: nothing is left, it is longer than 255 characters, or it holds control characters.

    >>> clean_name("../data\\\\pairs.jsonl")
    'pairs.jsonl'
    """
    name = filename.replace("\\", "/").rpartition("/")[2]
    if not name or len(name) > 255 or not name.isprintable():
        raise InputError("the file's name is empty, longer than 255 characters or not printable; give it a plain one")
    return name


def receive(
    platform: Platform, project: str, filename: str, purpose: str, chunks: Iterable[bytes], *, max_bytes: int = MAX_UPLOAD
) -> File:
    """Keep an uploaded file and queue its validation.

    Raises
        InputError: an ending that is not read, or an empty file.
        TooLarge: more bytes than are allowed.
    """
    filename = clean_name(filename)
    suffix = suffix_of(filename)
    file_id = new_id("file-")
    stored = platform.artifacts.put(f"files/{file_id}{suffix}", chunks, max_bytes=max_bytes)
    if stored.bytes == 0:
        platform.artifacts.delete(stored.key)
        raise InputError(f"file {filename!r} is empty; upload at least one row")
    file = File(
        id=file_id, project=project, filename=filename, purpose=purpose, bytes=stored.bytes, sha256=stored.sha256,
        status="uploaded", artifact=stored.key,
    )  # fmt: skip
    return register(platform, file)


def register(platform: Platform, file: File) -> File:
    """Make a file known whose bytes are kept, and queue its validation."""
    return validate(platform, platform.store.insert(file))


def validate(platform: Platform, file: File) -> File:
    """Queue the validation of a file whose bytes are kept; one that is no training data is ready at once."""
    if file.purpose in OTHER_PURPOSES:
        return platform.store.change(File, file.id, {"status": "processed"}, expect={"status": "uploaded"}) or file
    job = Job(
        id=new_id("job-"),
        project=file.project,
        work="validate",
        status="queued",
        files=(file.id,),
        priority=10,
        slots=0,
        max_attempts=2,
    )
    platform.store.insert(job)
    return file


def delete(platform: Platform, file: File) -> None:
    """Forget a file and its bytes; what ended jobs made of it stays.

    Raises
        WrongState: a job that has not ended reads it, and would fail where it has to begin or go on.
    """
    reader = next((job for job in active_jobs(platform, file.project) if job.work != "validate" and file.id in job.files), None)
    if reader is not None:
        raise WrongState(
            f"file {file.id} is read by job {reader.id}, which is {reader.status}; cancel the job first, or let it end"
        )
    platform.store.change(File, file.id, {"deleted_at": now()})
    platform.artifacts.delete(file.artifact)


def apply_report(platform: Platform, file_id: str, report: dict[str, Any]) -> None:
    """Keep what validation found."""
    changes = {
        "status": "processed" if report["valid"] else "error",
        "report": report,
        "num_rows": report.get("num_rows"),
        "format": report.get("format", ""),
    }
    platform.store.change(File, file_id, changes, expect={"status": ("uploaded", "processing")})


def unpacks_too_far(path: str) -> str:
    """Why a packed file is not read, empty where it may be: text packs to a fifth or a tenth, a bomb to a thousandth.

    It is unpacked chunk by chunk and given up at the limit, so that looking costs no memory and bounded time.

    Raises
        InputError: it is cut or no such archive.
    """
    place = Path(path)
    is_packed = place.name.lower().endswith(COMPRESSED[1:])
    is_parquet = place.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".parquet")
    if not is_packed and not is_parquet:
        return ""
    most = max(FREE_UNPACKED, MAX_RATIO * place.stat().st_size)
    seen, sizes = 0, itertools.chain(_unpacked(place) if is_packed else (), _decoded(place) if is_parquet else ())
    for size in sizes:
        seen += size
        if seen > most:
            return f"unpacks to more than {MAX_RATIO} times its size; upload it unpacked, or in parts"
    return ""


def _unpacked(place: Path) -> Iterator[int]:
    """The sizes of a packed file's chunks."""
    from preftune.data.sources.base import reading

    with reading(place) as file:
        while chunk := file.read(CHUNK):
            yield len(chunk)


def _decoded(place: Path) -> Iterator[int]:
    """The sizes of a Parquet file's rows in memory: first of its pages, as it says itself, then as they are decoded.

    A column of one value again and again is a few bytes in the file and in its pages; only decoding tells.
    """
    import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types

    from preftune.data.sources.base import reading

    try:
        with reading(place) as file:
            table = pq.ParquetFile(file)
            for group in range(table.num_row_groups):
                yield table.metadata.row_group(group).total_byte_size
                for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
                    yield batch.nbytes + BYTES_A_ROW * batch.num_rows
    except (pa.ArrowException, ValueError, TypeError):
        return  # who reads it says what is wrong with it


def inspect(path: str, filename: str, told_as: str | None = None) -> dict[str, Any]:
    """What a file holds: whether it can be trained on, its format, rows read and left out, the first bad rows.

    The JSON that a client is shown; every message names the row, not a path of this machine. ``told_as``: the format in
    whose words the bad rows of a file of no format are told.
    """
    from preftune.core.errors import PreftuneError
    from preftune.data.pipeline import read_examples, read_prompts

    try:
        bomb = unpacks_too_far(path)
        if bomb:
            return {"valid": False, "error": f"{filename} {bomb}", "error_type": "INVALID_FORMAT"}
        read = read_examples([path])
    except PreftuneError as error:
        try:
            prompts = read_prompts(path)
        except PreftuneError:
            refused = {"valid": False, "error": str(error).replace(path, filename), "error_type": "INVALID_FORMAT"}
            return refused if told_as is None else {**refused, **_bad_rows(path, told_as)}
        return {"valid": True, "format": "prompts", "num_rows": len(prompts), "num_excluded": 0, "bad_rows": []}
    bad = [_told(row) for row in read.excluded[:MAX_REPORTED]]
    report: dict[str, Any] = {
        "valid": bool(read.examples),
        "format": next(iter(read.formats.values()), ""),
        "num_rows": len(read.examples),
        "num_excluded": len(read.excluded),
        "bad_rows": bad,
        "kinds": _kinds(read.examples),
        "annotators": _annotators(read.examples),
    }
    if not read.examples:
        first = bad[0] if bad else {"line": 0, "message": "it has no rows"}
        report |= {
            "error": f"no row can be used; the first, line {first['line']}: {first['message']}",
            "error_type": "INVALID_FORMAT",
        }
    return report


def _told(row: Any) -> dict[str, Any]:
    return {"line": row.line, "reason": row.reason, "field": row.field, "message": row.detail}


def _bad_rows(path: str, told_as: str) -> dict[str, Any]:
    """The bad rows of a file, read as a format that it does not wholly have."""
    from preftune.core.errors import PreftuneError
    from preftune.data.pipeline import Reader

    found: list[Any] = []
    try:
        for _ in Reader([path], format=told_as, on_excluded=found.append):
            pass
    except PreftuneError:
        if not found:
            return {}
    return {"bad_rows": [_told(row) for row in found[:MAX_REPORTED]], "num_excluded": len(found)}


def _annotators(examples: Iterable[Any]) -> list[str]:
    """Who judged the rows, as far as the file says; at most MAX_ANNOTATORS of them."""
    return sorted({one for example in examples for one in example.provenance.annotators})[:MAX_ANNOTATORS]


def _kinds(examples: Iterable[Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in examples:
        kind = type(example.judgement).__name__.lower()
        counts[kind] = counts.get(kind, 0) + 1
    return counts
