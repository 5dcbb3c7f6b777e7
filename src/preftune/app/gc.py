"""Give disk space back: what a crash left behind, old checkpoints of runs that did not finish, old caches, and of an
installation the folders of deleted jobs and the bytes that no record names.

Never touched: final models, reports, metrics, recipes, the newest checkpoint of a stage that did not finish, and
whatever a running process holds.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.app import gc_jobs
from preftune.app.context import Context
from preftune.app.holding import HOLDERS, Holder, holders
from preftune.app.jobs.platform import Platform
from preftune.app.runs import RUN_FILE, RunFolder
from preftune.core.errors import InputError
from preftune.core.files import TEMPORARY_PREFIX

HOUR, DAY = 3600.0, 86_400.0
LEFTOVER_AGE_S = HOUR
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that may go: where, how large, and why. path: an artifact's key where it is no file of this machine's own."""

    path: Path | str
    num_bytes: int
    kind: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.path), "bytes": self.num_bytes, "kind": self.kind, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Collection:
    """What was found, and whether it was deleted; ``kept`` says what was left alone and why."""

    found: list[Garbage]
    kept: list[str] = field(default_factory=list)
    is_deleted: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of it all."""
        return sum(one.num_bytes for one in self.found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "deleted": self.is_deleted,
            "bytes": self.num_bytes,
            "found": [one.to_dict() for one in self.found],
            "kept": self.kept,
        }

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [f"{_size(one.num_bytes):>9}  {one.kind:<11} {one.path}  ({one.reason})" for one in self.found]
        lines += [f"     kept  {text}" for text in self.kept]
        word = "deleted" if self.is_deleted else "to delete"
        end = "" if self.is_deleted or not self.found else "; `preftune gc --yes` deletes them"
        return [*lines, f"{len(self.found)} {word}, {_size(self.num_bytes)}{end}"]


@dataclass(frozen=True, slots=True)
class Policy:
    """How old or large a thing must be. max_reference_gb: of the reference cache, oldest first; None for no limit."""

    cache_days: float = 30.0
    max_reference_gb: float | None = None


def collect(output: Path, policy: Policy, context: Context | None = None, *, is_deleting: bool = False) -> Collection:
    """Find what may go below a folder of runs and in the caches; delete it where asked to."""
    place = context or Context.from_environment()
    kept: list[str] = []
    with ExitStack() as stack:
        platform = gc_jobs.opened(place)
        if platform is not None:
            stack.enter_context(platform)
        found = [*_of_runs(output, kept), *_of_caches(place, policy, kept), *_of_jobs(platform, kept)]
        seen: dict[Path | str, Garbage] = {}
        for one in found:
            seen.setdefault(one.path, one)
        if is_deleting:
            for one in seen.values():
                if isinstance(one.path, Path):
                    _delete(one.path)
                elif platform is not None:
                    platform.artifacts.delete(one.path)
    return Collection(sorted(seen.values(), key=lambda one: str(one.path)), kept, is_deleting)


def _of_runs(output: Path, kept: list[str]) -> Iterator[Garbage]:
    for path in _leftovers(output):
        yield Garbage(path, _bytes(path), "temporary", "left by a write that did not end")
    for run_file in sorted(output.glob(f"**/{RUN_FILE}")) if output.is_dir() else []:
        run = RunFolder(run_file.parent)
        users = holders(run.path)
        if users:
            kept.append(f"{run.path}: {_users(users)}")
            continue
        for path in _leftovers(run.path, any_depth=True):
            yield Garbage(path, _bytes(path), "temporary", "left by a write that did not end")
        try:
            status = str(run.read().get("status", ""))
        except InputError:
            kept.append(f"{run.path}: its run.json cannot be read")
            continue
        if status != "succeeded":
            yield from _old_checkpoints(run, "crashed" if status == "running" else status)


def _of_jobs(platform: Platform | None, kept: list[str]) -> Iterator[Garbage]:
    """What the store of the installation no longer names."""
    if platform is None:
        return
    for one in gc_jobs.forgotten_folders(platform, kept):
        yield Garbage(one.place, one.num_bytes, "job", one.reason)
    for one in gc_jobs.forgotten_artifacts(platform, kept):
        yield Garbage(one.place, one.num_bytes, "artifact", one.reason)


def _old_checkpoints(run: RunFolder, status: str) -> Iterator[Garbage]:
    """All but the newest checkpoint of each stage; resuming needs the newest alone."""
    for stage in sorted((run.path / "stages").glob("*")):
        steps = sorted(path for path in (stage / "checkpoints").glob("step-*") if (path / "manifest.json").is_file())
        for path in steps[:-1]:
            yield Garbage(path, _bytes(path), "checkpoint", f"run {status or 'unfinished'}; {steps[-1].name} is newer")


def _of_caches(place: Context, policy: Policy, kept: list[str]) -> Iterator[Garbage]:
    users = holders(place.cache)
    if users:
        kept.append(f"{place.cache}: {_users(users)}")
        return
    now = time.time()
    for path in [*_leftovers(place.cache, any_depth=True), *_leftovers(place.state, any_depth=True)]:
        yield Garbage(path, _bytes(path), "temporary", "left by a write that did not end")
    for path in sorted((place.cache / "probes").glob("*.json")):
        days = (now - path.stat().st_mtime) / DAY
        if days > policy.cache_days:
            yield Garbage(path, _bytes(path), "probe", f"{days:.0f} days old")
    references = sorted((path for path in place.reference_cache.glob("*") if path.is_dir()), key=_newest)
    left = sum(map(_bytes, references))
    for path in references:
        days, size = (now - _newest(path)) / DAY, _bytes(path)
        if days > policy.cache_days:
            reason = f"not written for {days:.0f} days; scored again where needed"
        elif policy.max_reference_gb is not None and left > policy.max_reference_gb * _GB:
            reason = f"the cache holds {_size(left)}, the limit is {policy.max_reference_gb:g} GB"
        else:
            continue
        left -= size
        yield Garbage(path, size, "reference", reason)


def _leftovers(folder: Path, *, any_depth: bool = False) -> list[Path]:
    """Temporary files and folders of atomic writes, old enough not to be under way."""
    pattern = f"**/{TEMPORARY_PREFIX}*" if any_depth else f"{TEMPORARY_PREFIX}*"
    before = time.time() - LEFTOVER_AGE_S
    paths = [path for path in folder.glob(pattern) if _newest(path) < before] if folder.is_dir() else []
    return sorted(path for path in paths if not any(other in path.parents for other in paths))


def _newest(path: Path) -> float:
    """When anything in a folder changed last."""
    times = [path.stat().st_mtime]
    if path.is_dir():
        times += [inner.stat().st_mtime for inner in path.rglob("*") if HOLDERS not in inner.parts]
    return max(times)


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())


def _delete(path: Path) -> None:
    if path.is_dir():
        doomed = path.with_name(f"{TEMPORARY_PREFIX}gc-{path.name}")  # loses its name first, so that none is half there
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _users(users: list[Holder]) -> str:
    return "in use by " + ", ".join(f"process {one.pid} on {one.host}" for one in users)


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
