"""What a store does; every back end passes the same tests (tests/contract/store)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from preftune.core.errors import PreftuneError
from preftune.store.records import Event, Job, Record

R = TypeVar("R", bound=Record)
MAX_PAGE = 10_000


class Conflict(PreftuneError):
    """A record with a field that must be unique, and is not."""


class StoreUnavailable(PreftuneError):
    """The database does not answer, or is locked for longer than a writer waits; the same call may work later."""


class LeaseLost(PreftuneError):
    """A worker wrote to a job that is no longer its own."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to list.

    Parameters
        project: None lists over all projects (for the operator only).
        where: field to value, or to several values of which one must match; fields that the record lists as filters.
        after: id of the last record of the page before. limit: of this page. is_newest_first: the order.
        with_deleted: records with ``deleted_at`` too.
        metadata: pairs that a job's metadata must hold.
    """

    project: str | None
    where: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None
    limit: int = 20
    is_newest_first: bool = True
    with_deleted: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """Records of a list, and whether there are more."""

    items: tuple[R, ...]
    has_more: bool


class Store(Protocol):
    """Records by kind. Every method is one transaction and may be called from several threads and processes."""

    def insert(self, record: R, events: Sequence[Event] = ()) -> R:
        """Keep a new record (and events, in the same transaction); it comes back with its number.

        Raises
            Conflict: its id, or a field that must be unique, is taken.
        """

    def get(self, kind: type[R], record_id: str, project: str | None = None, *, with_deleted: bool = False) -> R | None:
        """The record of that id, in that project if one is named."""

    def page(self, kind: type[R], query: Query) -> Page[R]:
        """A page of a list.

        Raises
            ValueError: a filter that the kind does not have.
        """

    def count(self, kind: type[R], query: Query) -> int:
        """How many records a list has over all its pages."""

    def change(
        self,
        kind: type[R],
        record_id: str,
        changes: Mapping[str, Any],
        *,
        expect: Mapping[str, Any] | None = None,
        events: Sequence[Event] = (),
    ) -> R | None:
        """Change fields if ``expect`` holds (a tuple of values: one of them must match); None, and nothing, where it does not.

        Raises
            Conflict: a field that must be unique is taken.
        """

    def claim(self, worker: str, *, work: Sequence[str], slots: int, lost: Mapping[str, int]) -> Job | None:
        """Give a worker the next job: of the highest priority, of these the oldest.

        Queued jobs, and running ones whose worker died: those in ``lost`` (id to beat) whose beat is still that one. The
        job comes back ``running`` with this worker, the next attempt and beat 0. A lost job whose workers died too often
        becomes ``failed``. Two callers never get one job.
        """

    def beat(self, job: Job) -> Job:
        """Say that the worker of a job lives; the job as it is now, with what was asked of it.

        Raises
            LeaseLost: the job is another worker's, or has ended.
        """

    def write_as_worker(self, job: Job, changes: Mapping[str, Any], events: Sequence[Event] = ()) -> Job:
        """Change a job as the worker that runs it.

        Raises
            LeaseLost: the job is another worker's, or has ended; nothing was written.
        """

    def dump(self) -> Iterator[Record]:
        """Every record with its number, kind by kind, all as they were at one moment."""

    def load(self, records: Iterable[Record]) -> int:
        """Fill an empty store with records and their numbers, all or none; how many.

        Raises
            Conflict: the store holds a record already.
        """

    def close(self) -> None:
        """Let go of connections."""


def lost_attempts(job: Job) -> dict[str, Any]:
    """The changes that end a job whose workers died too often."""
    times = job.attempt - job.forgiven
    message = f"its worker died {times} times without getting any further; the last one was {job.worker}"
    return {"status": "failed", "worker": "", "error": {"code": "worker_lost", "message": message, "param": None}}


def every(store: Store, kind: type[R], query: Query) -> Iterator[R]:
    """Every record of a list, page by page; ``query.limit``: records of a page, not of the list."""
    while True:
        page = store.page(kind, query)
        yield from page.items
        if not page.has_more:
            return
        query = replace(query, after=page.items[-1].id)
