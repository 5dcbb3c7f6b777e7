"""The whole state of an installation in one file, and back: ``preftune backup`` and ``preftune restore``.

The file is a tar archive: every record of the database as JSON Lines (so a backup of SQLite may be restored into PostgreSQL),
the bytes of every file, and the folders of jobs with their checkpoints. It is taken beside a running server and its workers: the
records are those of one moment; artifacts are never changed once they are there; and the files of a job are held by hard links
while they are copied, so that a checkpoint which is pruned meanwhile is inside as a whole. A job that ran goes on from its last
checkpoint after a restore. The last member lists the digest of each; a restore checks them.

Not inside: caches, which can be made again, and ``secret.key``: keep it elsewhere, or users give their keys again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from preftune.app.jobs.platform import Platform
from preftune.core.errors import InputError, PreftuneError
from preftune.core.files import TEMPORARY_PREFIX, replacing
from preftune.core.version import __version__
from preftune.store.artifacts import Artifacts
from preftune.store.base import Store
from preftune.store.records import KINDS, File, Job, Record, Upload

RECORDS, ARTIFACTS, JOBS, MANIFEST = "records.jsonl", "artifacts/", "jobs/", "manifest.json"
FORMAT = 1
_KINDS = {kind.kind: kind for kind in KINDS}
CHUNK = 1 << 20
TRIES = 20


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What went into a backup, or came out of it."""

    path: str
    records: int
    files: int
    job_files: int
    bytes: int
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = {name: getattr(self, name) for name in ("path", "records", "files", "job_files", "bytes")}
        return {**found, "missing": list(self.missing)}

    def summary(self) -> list[str]:
        """What a person reads."""
        what = f"{self.records:,} records, {self.files:,} files, {self.job_files:,} files of jobs"
        return [f"{self.path}: {what}, {self.bytes / 1e6:,.1f} MB", *(f"not there: {name}" for name in self.missing)]


def backup(platform: Platform, path: Path) -> BackupResult:
    """Write the state of an installation to a file, whole or not at all."""
    records = list(platform.store.dump())
    digests: dict[str, str] = {}
    missing: list[str] = []
    counts = {"files": 0, "jobs": 0}
    with replacing(path) as target, tarfile.open(fileobj=target, mode="w") as archive:
        lines = (json.dumps({"kind": record.kind, **record.model_dump(mode="json")}) for record in records)
        _add_bytes(archive, RECORDS, "".join(line + "\n" for line in lines).encode(), digests)
        for key in _keys(records):
            try:
                size = platform.artifacts.size(key)
                with platform.artifacts.open(key) as source:
                    _add(archive, ARTIFACTS + key, source, size, digests)
                counts["files"] += 1
            except FileNotFoundError:
                missing.append(key)
        for record in records:
            if isinstance(record, Job) and record.deleted_at is None:
                with _held(platform.job_folder(record.id)) as folder:
                    for file in (path for path in sorted(folder.rglob("*")) if path.is_file()):
                        with file.open("rb") as source:
                            # what grows meanwhile (metrics, logs) is taken up to the length that it has now
                            size = file.stat().st_size
                            _add(archive, f"{JOBS}{record.id}/{file.relative_to(folder)}", source, size, digests)
                        counts["jobs"] += 1
        manifest = {"format": FORMAT, "version": __version__, "records": len(records), "digests": digests}
        _add_bytes(archive, MANIFEST, json.dumps(manifest).encode(), {})
    size = path.stat().st_size if path.is_file() else 0
    return BackupResult(str(path), len(records), counts["files"], counts["jobs"], size, tuple(missing))


def restore(path: Path, store: Store, artifacts: Artifacts, home: Path) -> BackupResult:
    """Fill an empty installation from a backup. Everything is checked before the database is written, in one transaction.

    Raises
        InputError: no backup, one that is damaged, or of a newer version.
        PreftuneError: the installation is not empty.
    """
    if any(True for _ in store.dump()):
        raise PreftuneError("the installation is not empty; restore into a new database and a new PREFTUNE_HOME")
    if (home / "jobs").exists():
        raise PreftuneError(f"{home / 'jobs'} is there already; restore into a new PREFTUNE_HOME")
    digests: dict[str, str] = {}
    records: list[Record] = []
    counts = {"files": 0, "jobs": 0}
    manifest: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isfile() else None
                if source is None:
                    raise InputError(f"{path}: {member.name} is no plain file; this is no backup of preftune")
                if member.name == MANIFEST:
                    manifest = json.loads(source.read())
                elif member.name == RECORDS:
                    content = source.read()
                    digests[RECORDS] = hashlib.sha256(content).hexdigest()
                    records = [_record(json.loads(line), home) for line in content.decode().splitlines()]
                elif member.name.startswith(ARTIFACTS):
                    digests[member.name] = artifacts.put(member.name.removeprefix(ARTIFACTS), _chunks(source)).sha256
                    counts["files"] += 1
                elif member.name.startswith(JOBS):
                    hashed = _Hashed(source, member.size)
                    with replacing(_inside(home, member.name)) as target:
                        shutil.copyfileobj(hashed, target, CHUNK)
                    digests[member.name] = hashed.digest.hexdigest()
                    counts["jobs"] += 1
                else:
                    raise InputError(f"{path}: {member.name} belongs to no backup of preftune")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a backup: {error}") from None
    _check(path, manifest, digests)
    store.load(records)
    return BackupResult(str(path), len(records), counts["files"], counts["jobs"], path.stat().st_size)


def _check(path: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
    if not manifest:
        raise InputError(f"{path} ends early: it has no {MANIFEST}; the backup was cut, take another one")
    if manifest.get("format", 0) > FORMAT:
        raise InputError(f"{path} was written by preftune {manifest.get('version')}; install that version or a newer one")
    wrong = [name for name, digest in manifest["digests"].items() if digests.get(name) != digest]
    if wrong:
        raise InputError(
            f"{path} is damaged: {wrong[0]} and {len(wrong) - 1} more differ from their digests; take another backup"
        )


def _keys(records: list[Record]) -> Iterator[str]:
    """Every artifact that a record names."""
    for record in records:
        if isinstance(record, File) and record.artifact and record.deleted_at is None:
            yield record.artifact
        elif isinstance(record, Upload) and record.status == "pending":
            yield from (str(part["artifact"]) for part in record.parts.values() if "artifact" in part)


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """The files of a job as they are at one moment, under a second name that nobody prunes; without those being written."""
    held = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder.parent if folder.parent.is_dir() else None))
    try:
        for _ in range(TRIES):
            try:
                _link(folder, held)
                break
            except FileNotFoundError:  # a checkpoint was pruned between the look and the link
                shutil.rmtree(held)
                held.mkdir()
        else:
            raise PreftuneError(f"{folder} changes faster than it can be copied; take the backup again")
        yield held
    finally:
        shutil.rmtree(held, ignore_errors=True)


def _link(folder: Path, held: Path) -> None:
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        parts = path.relative_to(folder).parts
        if parts == ("lock",) or path.is_symlink() or any(part.startswith(TEMPORARY_PREFIX) for part in parts):
            continue
        if not path.is_dir():
            target = held.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk


def _record(body: dict[str, Any], home: Path) -> Record:
    """A record as it stood, with the folders of jobs in their new place; running work waits for a worker again."""
    record = _KINDS[body.pop("kind")].model_validate(body)
    if isinstance(record, Job) and record.status in {"running", "exporting"}:
        return record.model_copy(update={"status": "queued", "worker": "", "forgiven": record.attempt})
    run = getattr(record, "run", "")
    if isinstance(run, str) and f"/jobs/{getattr(record, 'job', '')}/" in run:
        tail = run.partition(f"/jobs/{getattr(record, 'job', '')}/")[2]
        return record.model_copy(update={"run": str(home / "jobs" / getattr(record, "job", "") / tail)})
    return record


def _inside(home: Path, name: str) -> Path:
    path = (home / name).resolve()
    if not path.is_relative_to((home / "jobs").resolve()):
        raise InputError(f"{name} leads out of the installation; this is no backup of preftune")
    return path


class _Hashed(io.RawIOBase):
    """So many bytes of a source, hashed while they are read."""

    def __init__(self, source: Any, size: int) -> None:
        super().__init__()
        self._source, self._left = source, size
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        content: bytes = self._source.read(wanted)
        self._left -= len(content)
        self.digest.update(content)
        return content


def _add(archive: tarfile.TarFile, name: str, source: Any, size: int, digests: dict[str, str]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(time.time()), 0o600
    hashed = _Hashed(source, size)
    archive.addfile(info, hashed)
    digests[name] = hashed.digest.hexdigest()


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes, digests: dict[str, str]) -> None:
    _add(archive, name, io.BytesIO(content), len(content), digests)
