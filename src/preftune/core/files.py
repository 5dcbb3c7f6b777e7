"""Atomic writes, for every file and folder that a run leaves behind.

A reader sees the old content or the new one, never half of it: content goes to a sibling with a temporary
name, is flushed to the disk, and is then renamed. A crash leaves at most a temporary sibling behind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TEMPORARY_PREFIX = ".writing-"


def sync_path(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of ``path`` when it is whole; nothing changes where the work fails.

    A device or a pipe (/dev/null, /dev/stdout) is written to directly: it has no content to protect.

    Raises
        OSError: the path cannot be written, or is a folder.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Replace a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a folder atomically: yields a temporary sibling that becomes ``path`` when the block ends well.

    An existing folder at ``path`` is replaced. Every file is flushed before the rename, so a folder of that
    name is always whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync_path(file)
        sync_path(temporary)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
            path.rename(old / "old")
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        sync_path(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line; a crash can cut only the last line, which readers skip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines in one write and flush them to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def reopen_jsonl(path: Path, keep: Callable[[list[dict[str, Any]]], int] = len) -> list[dict[str, Any]]:
    """The rows of an append-only file that a crash may have cut, with the cut line taken off, so that appending goes on.

    Parameters
        keep: how many of the whole rows to keep; the others are taken off too.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = content.split(b"\n")[:-1]  # what is behind the last line feed was cut
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    kept = keep(rows)
    whole = b"".join(line + b"\n" for line in lines[:kept])
    if whole != content:
        write_bytes(path, whole)
    return rows[:kept]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file of our own; a last line cut by a crash is skipped."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1 and any(rest.strip() for rest in lines[number + 1 :]):
                raise
    return rows


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders that a crash left in ``folder``."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
