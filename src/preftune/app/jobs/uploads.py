"""Files that come in parts, or after they were announced."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from preftune.app.jobs import files
from preftune.app.jobs.platform import MAX_UPLOAD, Platform
from preftune.core.errors import InputError, UsageError
from preftune.store.base import Conflict, Query
from preftune.store.records import File, Upload, new_id, now

MAX_PARTS = 10_000
LIFETIME = timedelta(hours=24)


def announce(platform: Platform, project: str, filename: str, purpose: str, sha256: str = "") -> File:
    """A file whose bytes are still to come.

    Raises
        InputError: an ending that is not read.
    """
    filename = files.clean_name(filename)
    files.suffix_of(filename)
    file = File(id=new_id("file-"), project=project, filename=filename, purpose=purpose, sha256=sha256, status="pending")
    return platform.store.insert(file)


def same_file(platform: Platform, project: str, purpose: str, sha256: str) -> File | None:
    """A whole and usable file of the project with these bytes and purpose."""
    if not sha256:
        return None
    where = {"sha256": sha256.lower(), "purpose": purpose, "status": ("uploaded", "processing", "processed")}
    found = platform.store.page(File, Query(project, where, limit=1)).items
    return found[0] if found else None


def fill(platform: Platform, file: File, chunks: Iterable[bytes], *, max_bytes: int = MAX_UPLOAD) -> File:
    """The bytes of an announced file; its validation is queued. The same bytes again change nothing.

    Raises
        InputError: no bytes, or not those whose digest was announced; nothing was kept.
        Conflict: other bytes have come in the meantime.
        TooLarge: more bytes than are allowed.
    """
    key = f"files/{file.id}-{secrets.token_hex(4)}{files.suffix_of(file.filename)}"
    stored = platform.artifacts.put(key, chunks, max_bytes=max_bytes)
    if stored.bytes == 0 or (file.status == "pending" and file.sha256 and stored.sha256 != file.sha256.lower()):
        platform.artifacts.delete(key)
        why = "is empty; upload at least one row" if stored.bytes == 0 else "does not have the announced SHA-256; upload it again"
        raise InputError(f"file {file.filename!r} {why}")
    here = {"bytes": stored.bytes, "sha256": stored.sha256, "artifact": key, "status": "uploaded"}
    kept = platform.store.change(File, file.id, here, expect={"status": "pending"})
    if kept is None:
        platform.artifacts.delete(key)
        before = platform.store.get(File, file.id)
        if before is None or before.sha256 != stored.sha256:
            raise Conflict(f"file {file.id!r} has its bytes already, and these are others")
        return before
    return files.validate(platform, kept)


def begin(
    platform: Platform, project: str, filename: str, purpose: str, size: int, *, sha256: str = "", file: str = ""
) -> Upload:
    """An upload in parts.

    Raises
        InputError: an ending that is not read, or a size that is not allowed.
    """
    filename = files.clean_name(filename)
    files.suffix_of(filename)
    if not 0 < size <= MAX_UPLOAD:
        raise InputError(f"file {filename!r}: {size:,} bytes; between 1 and {MAX_UPLOAD:,} are allowed")
    upload = Upload(
        id=new_id("upload_"), project=project, filename=filename, purpose=purpose, bytes=size, sha256=sha256, file=file,
        expires_at=now() + LIFETIME,
    )  # fmt: skip
    return platform.store.insert(upload)


def add_part(platform: Platform, upload: Upload, name: str, chunks: Iterable[bytes]) -> tuple[str, str]:
    """Keep a part under a name; its ETag and its name. A part that comes again takes the place of the one before.

    Raises
        UsageError: the upload has ended, its time is over, or its parts are twice what it was to have.
        TooLarge: more bytes than the whole file was to have.
    """
    _must_be_open(upload)
    if sum(part["bytes"] for part in upload.parts.values()) >= 2 * upload.bytes or len(upload.parts) >= MAX_PARTS:
        raise UsageError(f"upload {upload.id!r} has more parts than its {upload.bytes:,} bytes can need; complete or cancel it")
    key = f"uploads/{upload.id}/{name}-{secrets.token_hex(4)}"
    stored = platform.artifacts.put(key, chunks, max_bytes=upload.bytes)
    etag = stored.sha256[:32]
    part: dict[str, Any] = {"key": key, "bytes": stored.bytes, "etag": etag}
    while True:
        current = platform.store.get(Upload, upload.id)
        if current is None or current.status != "pending":
            platform.artifacts.delete(key)
            raise UsageError(f"upload {upload.id!r} has ended; begin another")
        before = current.parts.get(name)
        parts = {**current.parts, name: part}
        expect = {"status": "pending", "parts": current.parts}
        if platform.store.change(Upload, upload.id, {"parts": parts}, expect=expect) is not None:
            if before is not None:
                platform.artifacts.delete(before["key"])
            return etag, name


def complete(platform: Platform, upload: Upload, names: Sequence[str], *, md5: str | None = None) -> tuple[Upload, File]:
    """The parts, in this order, as a file. Asked again it answers with the file of before.

    Raises
        UsageError: the upload has ended otherwise, or a part is missing.
        InputError: the parts are not as many bytes as were announced, or the digest is another; the upload stays open.
    """
    if upload.status == "completed":
        done = platform.store.get(File, upload.file)
        if done is not None:
            return upload, done
    _must_be_open(upload)
    missing = [name for name in names if name not in upload.parts]
    if missing or not names:
        raise UsageError(f"upload {upload.id!r} has no part {missing[0] if missing else 1}; send it first")
    size = sum(upload.parts[name]["bytes"] for name in names)
    if size != upload.bytes:
        raise InputError(
            f"upload {upload.id!r} was to have {upload.bytes:,} bytes, its parts have {size:,}; send what is missing"
        )
    digest = hashlib.md5(usedforsecurity=False)

    def joined() -> Iterator[bytes]:
        for name in names:
            for chunk in platform.artifacts.read(upload.parts[name]["key"]):
                digest.update(chunk)
                yield chunk
        if md5 and digest.hexdigest() != md5.lower():
            raise InputError(f"upload {upload.id!r}: its parts have another MD5 than {md5!r}; send them again")

    announced = platform.store.get(File, upload.file) if upload.file else None
    file = announced or announce(platform, upload.project, upload.filename, upload.purpose, upload.sha256)
    kept = fill(platform, file, joined())
    changed = platform.store.change(
        Upload, upload.id, {"status": "completed", "file": kept.id, "parts": {}}, expect={"status": "pending"}
    )
    _forget(platform, upload)
    return changed or upload, kept


def cancel(platform: Platform, upload: Upload) -> Upload:
    """End an upload and let go of its parts.

    Raises
        UsageError: it is complete.
    """
    changed = platform.store.change(Upload, upload.id, {"status": "cancelled", "parts": {}}, expect={"status": "pending"})
    if changed is None and upload.status == "completed":
        raise UsageError(f"upload {upload.id!r} is complete; delete its file instead")
    _forget(platform, upload)
    return changed or upload


def _forget(platform: Platform, upload: Upload) -> None:
    for part in upload.parts.values():
        platform.artifacts.delete(part["key"])


def _must_be_open(upload: Upload) -> None:
    if upload.status != "pending":
        raise UsageError(f"upload {upload.id!r} is {upload.status}; begin another")
    if upload.expires_at is not None and upload.expires_at < now():
        raise UsageError(f"upload {upload.id!r} has expired; begin another")
