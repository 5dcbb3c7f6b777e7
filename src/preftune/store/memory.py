"""A store in memory: for tests and for one-shot use, with the behaviour of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from preftune.store.base import MAX_PAGE, Conflict, LeaseLost, Page, Query, R, lost_attempts
from preftune.store.records import KINDS, UNIQUE, Event, Job, Record, now


class MemoryStore:
    """Every record in a dictionary behind one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rows: dict[str, dict[str, Record]] = {}
        self._numbers: dict[str, int] = {}

    def insert(self, record: R, events: Sequence[Event] = ()) -> R:
        """See ``Store.insert``."""
        with self._lock:
            rows = self._rows.setdefault(record.kind, {})
            if record.id in rows:
                raise Conflict(f"{record.kind} {record.id!r} exists")
            self._check_unique(record)
            number = self._numbers[record.kind] = self._numbers.get(record.kind, 0) + 1
            kept = record.model_copy(update={"number": number})
            rows[record.id] = kept
            self._append(events)
            return kept

    def get(self, kind: type[R], record_id: str, project: str | None = None, *, with_deleted: bool = False) -> R | None:
        """See ``Store.get``."""
        with self._lock:
            row = self._rows.get(kind.kind, {}).get(record_id)
        if row is None or (project is not None and row.project != project):
            return None
        return None if _is_deleted(row) and not with_deleted else cast(R, row)

    def page(self, kind: type[R], query: Query) -> Page[R]:
        """See ``Store.page``."""
        rows = self._found(kind, query)
        if query.after is not None:
            after = self.get(kind, query.after, query.project, with_deleted=True)
            rows = [] if after is None else [
                row for row in rows if (row.number < after.number) == query.is_newest_first and row.number != after.number
            ]  # fmt: skip
        limit = min(query.limit, MAX_PAGE)
        return Page(tuple(rows[:limit]), len(rows) > limit)

    def count(self, kind: type[R], query: Query) -> int:
        """See ``Store.count``."""
        return len(self._found(kind, query))

    def change(
        self,
        kind: type[R],
        record_id: str,
        changes: Mapping[str, Any],
        *,
        expect: Mapping[str, Any] | None = None,
        events: Sequence[Event] = (),
    ) -> R | None:
        """See ``Store.change``."""
        with self._lock:
            row = self._rows.get(kind.kind, {}).get(record_id)
            if row is None or not all(_matches(getattr(row, key), value) for key, value in (expect or {}).items()):
                return None
            changed = kind.model_validate({**row.model_dump(), **changes})
            self._check_unique(changed)
            self._rows[kind.kind][record_id] = changed
            self._append(events)
            return changed

    def claim(self, worker: str, *, work: Sequence[str], slots: int, lost: Mapping[str, int]) -> Job | None:
        """See ``Store.claim``."""
        with self._lock:
            jobs = [cast(Job, row) for row in self._rows.get(Job.kind, {}).values() if not _is_deleted(row)]
            jobs = [job for job in jobs if job.work in work and job.slots <= slots]
            queued = [job for job in jobs if job.status == "queued"]
            dead = [job for job in jobs if job.status in {"running", "exporting"} and lost.get(job.id) == job.beat]
            for job in sorted([*queued, *dead], key=lambda job: (-job.priority, job.number)):
                if job.status != "queued" and not job.has_workers_left:
                    self.change(Job, job.id, {**lost_attempts(job), "finished_at": now(), "updated_at": now()})
                    continue
                stamp = {"started_at": job.started_at or now(), "updated_at": now()}
                mine = {"status": "running", "worker": worker, "attempt": job.attempt + 1, "beat": 0}
                return self.change(Job, job.id, {**mine, **stamp})
            return None

    def beat(self, job: Job) -> Job:
        """See ``Store.beat``."""
        with self._lock:
            return self.write_as_worker(job, {"beat": self._own(job).beat + 1})

    def write_as_worker(self, job: Job, changes: Mapping[str, Any], events: Sequence[Event] = ()) -> Job:
        """See ``Store.write_as_worker``."""
        with self._lock:
            self._own(job)
            written = self.change(Job, job.id, {**changes, "updated_at": now()}, events=events)
            assert written is not None
            return written

    def dump(self) -> Iterator[Record]:
        """See ``Store.dump``."""
        with self._lock:
            rows = [sorted(self._rows.get(kind.kind, {}).values(), key=lambda row: row.number) for kind in KINDS]
        for some in rows:
            yield from some

    def load(self, records: Iterable[Record]) -> int:
        """See ``Store.load``."""
        with self._lock:
            if any(self._rows.values()):
                raise Conflict("the store is not empty")
            found = list(records)
            for record in found:
                self._rows.setdefault(record.kind, {})[record.id] = record
                self._numbers[record.kind] = max(self._numbers.get(record.kind, 0), record.number)
            return len(found)

    def close(self) -> None:
        """Nothing to let go of."""

    def _own(self, job: Job) -> Job:
        row = self.get(Job, job.id)
        if row is None or (row.worker, row.attempt) != (job.worker, job.attempt) or row.status not in {"running", "exporting"}:
            raise LeaseLost(f"job {job.id} is no longer attempt {job.attempt} of worker {job.worker!r}")
        return row

    def _found(self, kind: type[R], query: Query) -> list[R]:
        unknown = set(query.where) - kind.filters
        if unknown:
            raise ValueError(f"{kind.kind} cannot be listed by {', '.join(sorted(unknown))}")
        with self._lock:
            rows = [cast(R, row) for row in self._rows.get(kind.kind, {}).values()]
        rows = [
            row
            for row in rows
            if (query.project is None or row.project == query.project)
            and (query.with_deleted or not _is_deleted(row))
            and all(_matches(getattr(row, key), value) for key, value in query.where.items())
            and all(getattr(row, "metadata", {}).get(key) == value for key, value in query.metadata.items())
        ]
        return sorted(rows, key=lambda row: row.number, reverse=query.is_newest_first)

    def _append(self, events: Sequence[Event]) -> None:
        for event in events:
            number = self._numbers[Event.kind] = self._numbers.get(Event.kind, 0) + 1
            self._rows.setdefault(Event.kind, {})[event.id] = event.model_copy(update={"number": number})

    def _check_unique(self, record: Record) -> None:
        for fields in UNIQUE.get(record.kind, ()):
            mine = tuple(getattr(record, name) for name in fields)
            if None in mine:
                continue
            for row in self._rows.get(record.kind, {}).values():
                if row.id != record.id and tuple(getattr(row, name) for name in fields) == mine:
                    raise Conflict(f"{record.kind}: {', '.join(fields)} {mine!r} is taken by {row.id!r}")


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (tuple, list, set, frozenset)) else bool(value == wanted)


def _is_deleted(row: Record) -> bool:
    return getattr(row, "deleted_at", None) is not None
