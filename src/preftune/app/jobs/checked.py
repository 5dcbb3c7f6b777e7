"""Files that are validated before they are kept: SeekrFlow's uploads, of which a bad one leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from preftune.app.jobs import files
from preftune.app.jobs.platform import MAX_UPLOAD, Platform
from preftune.core.errors import InputError, UsageError
from preftune.core.files import read_json, write_json
from preftune.store.records import File, new_id

SECONDS = 540.0  # SeekrFlow's client waits for 600
# purpose -> the format whose words a bad row is told in, and the judgement that every row must have
PURPOSES: Mapping[str, tuple[str, str]] = {
    "preference-fine-tune": ("seekrflow", "preference"),
    "fine-tune": ("messages", "demonstration"),
}
HARMLESS = frozenset({"duplicate"})  # rows that are left out, and that nobody has to mend


class DoesNotConform(InputError):
    """An upload with rows that its purpose does not allow; ``rows`` are the first of them."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


def receive_checked(
    platform: Platform, project: str, filename: str, purpose: str, chunks: Iterable[bytes], *, max_bytes: int = MAX_UPLOAD
) -> File:
    """Keep an uploaded file if every row conforms to its purpose.

    Raises
        DoesNotConform: some do not; nothing was kept.
        UsageError: a purpose that is not offered.
        InputError: an ending that is not read, or an empty file.
        TooLarge: more bytes than are allowed.
    """
    if purpose not in PURPOSES:
        raise UsageError(f"purpose {purpose!r} is not offered; there is {', '.join(PURPOSES)}")
    filename = files.clean_name(filename)
    file_id = new_id("file-")
    stored = platform.artifacts.put(f"files/{file_id}{files.suffix_of(filename)}", chunks, max_bytes=max_bytes)
    try:
        if stored.bytes == 0:
            raise InputError(f"file {filename!r} is empty; upload at least one row")
        path = platform.artifacts.local(stored.key, platform.context.cache / "artifacts")
        report = _inspect_apart(platform.home, path, filename, PURPOSES[purpose][0])
        _must_conform(report, filename, purpose)
        file = File(
            id=file_id, project=project, filename=filename, purpose=purpose, bytes=stored.bytes, sha256=stored.sha256,
            status="processed", artifact=stored.key, report=report, num_rows=report["num_rows"], format=report["format"],
        )  # fmt: skip
        return platform.store.insert(file)
    except BaseException:
        platform.artifacts.delete(stored.key)
        raise


def _must_conform(report: dict[str, Any], filename: str, purpose: str) -> None:
    kind = PURPOSES[purpose][1]
    rows = [row for row in report.get("bad_rows", ()) if row["reason"] not in HARMLESS]
    if rows:
        told = "; ".join(f"line {row['line']}{', ' + row['field'] if row['field'] else ''}: {row['message']}" for row in rows)
        more = report.get("num_excluded", len(rows)) - len(rows)
        told += f"; and {more} more" if more > 0 else ""
        raise DoesNotConform(f"{filename}: rows that {purpose} does not allow: {told}; nothing was stored", rows)
    if not report["valid"]:
        raise DoesNotConform(f"{filename}: {report.get('error', 'no row can be used')}; nothing was stored", [])
    others = {name: count for name, count in report.get("kinds", {}).items() if name != kind}
    if others:
        found = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
        raise DoesNotConform(f"{filename}: {purpose} takes rows with a {kind}, these have: {found}; nothing was stored", [])


def _inspect_apart(home: Path, path: Path, filename: str, told_as: str) -> dict[str, Any]:
    """What ``inspect`` says, from a process of its own: a file that breaks it, or takes too long, hurts nobody else."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="checking-") as folder:
        place = Path(folder)
        write_json(place / "task.json", {"work": "validate", "path": str(path), "filename": filename, "told_as": told_as})
        command = [sys.executable, "-m", "preftune.app.jobs.child", folder, str(os.getpid())]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)  # noqa: S603 -- our own interpreter and module, and a folder that we named
        except subprocess.TimeoutExpired:
            raise InputError(f"{filename}: its validation takes longer than {SECONDS:.0f} s; upload it in pieces") from None
        if (place / "report.json").is_file():
            return dict(read_json(place / "report.json"))
        error = read_json(place / "error.json") if (place / "error.json").is_file() else {}
        raise InputError(f"{filename}: cannot be read: {error.get('message', 'its validation ended without a word')}")
