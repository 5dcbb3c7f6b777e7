"""The bytes: uploaded files, exported weights, results. A folder by default, any fsspec file system by URL."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]  # it ships no types

from preftune.core.errors import InputError, PreftuneError
from preftune.core.files import TEMPORARY_PREFIX, sync_path

CHUNK = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class TooLarge(PreftuneError):
    """More bytes than were allowed; nothing was kept."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What was kept: where, how much, and its digest."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that is kept: where, how much, and when it was written (seconds since 1970)."""

    key: str
    bytes: int
    modified: float


class Artifacts:
    """Bytes by key. A key is one or more plain names joined by ``/``; nothing else ever becomes a path.

    Parameters
        url: a folder, or a URL that fsspec knows (``s3://bucket/prefix``). Named by the operator, never by a request.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            self._system, self._root = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"artifacts {url!r}: {str(error).splitlines()[0]}; write a folder, or install what the URL needs"
            ) from None
        self.url = url
        self._is_local = "file" in self._protocols
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True)

    def put(self, key: str, chunks: Iterable[bytes], *, max_bytes: int | None = None) -> Stored:
        """Keep the bytes under a key, whole or not at all; hashed while they arrive.

        Raises
            TooLarge: more than ``max_bytes``.
            OSError: the disk is full.
        """
        path = self._path(key)
        if self._is_local:
            return self._put_local(key, Path(path), chunks, max_bytes)
        counted = _Counted(chunks, max_bytes)
        # An object store shows an object only when its upload is complete; elsewhere a second name is moved over.
        is_whole = bool({"s3", "s3a", "gs", "gcs", "abfs", "az"} & set(self._protocols))
        name = path if is_whole else f"{path}.part-{secrets.token_hex(4)}"
        target = self._system.open(name, "wb")
        try:
            for chunk in counted:
                target.write(chunk)
            target.close()
        except BaseException:
            target.discard()
            if is_whole:
                target.closed = True  # or its finaliser would try to send what was thrown away
            if not is_whole and self._system.exists(name):
                self._system.rm_file(name)
            raise
        if not is_whole:
            self._system.mv(name, path)
        return Stored(key, counted.bytes, counted.sha256)

    def open(self, key: str) -> BinaryIO:
        """The bytes, from their start, seekable.

        Raises
            FileNotFoundError: nothing is kept under the key.
        """
        return cast(BinaryIO, self._system.open(self._path(key), "rb"))

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Chunks of the bytes from ``start`` to ``stop``."""
        with self.open(key) as file:
            file.seek(start)
            left = None if stop is None else stop - start
            while left is None or left > 0:
                chunk = file.read(CHUNK if left is None else min(CHUNK, left))
                if not chunk:
                    return
                left = None if left is None else left - len(chunk)
                yield chunk

    def size(self, key: str) -> int:
        """Number of bytes; FileNotFoundError where nothing is kept."""
        return int(self._system.size(self._path(key)))

    def exists(self, key: str) -> bool:
        """Whether something is kept under the key."""
        return bool(self._system.exists(self._path(key)))

    def delete(self, key: str) -> None:
        """Let go of the bytes; nothing happens where there are none."""
        if self.exists(key):
            self._system.rm_file(self._path(key))

    def entries(self) -> Iterator[Entry]:
        """Everything that is kept, by key."""
        prefix = f"{self._root.rstrip('/')}/"
        self._system.invalidate_cache()
        for path, facts in sorted(self._system.find(self._root, detail=True).items()):
            key = str(path).removeprefix(prefix)
            if _KEY.fullmatch(key):
                written = facts.get("mtime") or facts.get("LastModified") or facts.get("last_modified") or facts.get("created")
                modified = written.timestamp() if isinstance(written, datetime) else float(written or time.time())
                yield Entry(key, int(facts["size"]), modified)

    def local(self, key: str, cache: Path) -> Path:
        """A file on this machine with the bytes: the artifact itself, or a copy in ``cache``."""
        if self._is_local:
            return Path(self._path(key))
        path = cache / key
        if not path.is_file() or path.stat().st_size != self.size(key):
            self._put_local(key, path, self.read(key), None)
        return path

    @property
    def _protocols(self) -> tuple[str, ...]:
        given = self._system.protocol
        return (given,) if isinstance(given, str) else tuple(given)

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no artifact key")
        return f"{self._root.rstrip('/')}/{key}"

    @staticmethod
    def _put_local(key: str, path: Path, chunks: Iterable[bytes], max_bytes: int | None) -> Stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        counted = _Counted(chunks, max_bytes)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in counted:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_path(path.parent)
        return Stored(key, counted.bytes, counted.sha256)


class _Counted:
    """Chunks that pass through, counted and hashed."""

    def __init__(self, chunks: Iterable[bytes], max_bytes: int | None) -> None:
        self._chunks, self._max = chunks, max_bytes
        self._hash = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.bytes += len(chunk)
            if self._max is not None and self.bytes > self._max:
                raise TooLarge(f"more than the {self._max:,} bytes that are allowed")
            self._hash.update(chunk)
            yield chunk
