"""The store on SQLite and PostgreSQL: one code, short transactions, no wall clock in any decision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Select, and_, create_engine, event, func, insert, or_, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from preftune.core.errors import InputError
from preftune.store.base import MAX_PAGE, Conflict, LeaseLost, Page, Query, R, StoreUnavailable, lost_attempts
from preftune.store.migrate import upgrade
from preftune.store.records import KINDS, STORED, Event, Job, Record, now, storable
from preftune.store.tables import columns_of, tables

BUSY_SECONDS = 30.0
_RUNNING = ("running", "exporting")


class SqlStore:
    """Records in a database. Opening it brings its tables up to date."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        try:
            upgrade(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._reader = self._engine.execution_options(is_reader=True)
        steady = {} if self._engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._snapshot = self._engine.execution_options(is_reader=True, **steady)

    def insert(self, record: R, events: Sequence[Event] = ()) -> R:
        """See ``Store.insert``."""
        with self._write() as connection:
            kept = self._insert(connection, record)
            self._append(connection, events)
            return kept

    def get(self, kind: type[R], record_id: str, project: str | None = None, *, with_deleted: bool = False) -> R | None:
        """See ``Store.get``."""
        table = tables[kind.kind]
        query = select(table.c.number, table.c.body).where(table.c.id == storable(record_id))
        if project is not None:
            query = query.where(table.c.project == project)
        if not with_deleted and "deleted_at" in table.c:
            query = query.where(table.c.deleted_at.is_(None))
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else _record(kind, row)

    def page(self, kind: type[R], query: Query) -> Page[R]:
        """See ``Store.page``."""
        table = tables[kind.kind]
        asked = self._narrowed(select(table.c.number, table.c.body), kind, query)
        limit = min(query.limit, MAX_PAGE)
        with self._read() as connection:
            if query.after is not None:
                last = select(table.c.number).where(table.c.id == storable(query.after))
                if query.project is not None:
                    last = last.where(table.c.project == query.project)
                number = connection.execute(last).scalar()
                if number is None:
                    return Page((), has_more=False)
                asked = asked.where(table.c.number < number if query.is_newest_first else table.c.number > number)
            order = table.c.number.desc() if query.is_newest_first else table.c.number.asc()
            rows = connection.execute(asked.order_by(order).limit(limit + 1)).all()
        return Page(tuple(_record(kind, row) for row in rows[:limit]), len(rows) > limit)

    def count(self, kind: type[R], query: Query) -> int:
        """See ``Store.count``."""
        asked = self._narrowed(select(func.count()).select_from(tables[kind.kind]), kind, query)
        with self._read() as connection:
            return int(connection.execute(asked).scalar_one())

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
        with self._write() as connection:
            changed = self._change(connection, kind, record_id, changes, expect or {})
            if changed is not None:
                self._append(connection, events)
            return changed

    def claim(self, worker: str, *, work: Sequence[str], slots: int, lost: Mapping[str, int]) -> Job | None:
        """See ``Store.claim``."""
        table = tables[Job.kind]
        dead = [and_(table.c.id == one, table.c.beat == beat, table.c.status.in_(_RUNNING)) for one, beat in lost.items()]
        query = (
            select(table.c.number, table.c.body)
            .where(table.c.deleted_at.is_(None), table.c.work.in_(list(work)), table.c.slots <= slots)
            .where(or_(table.c.status == "queued", *dead))
            .order_by(table.c.priority.desc(), table.c.number)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._write() as connection:
            while (row := connection.execute(query).first()) is not None:
                job = _record(Job, row)
                if job.status != "queued" and not job.has_workers_left:
                    ended = {**lost_attempts(job), "finished_at": now(), "updated_at": now()}
                    self._change(connection, Job, job.id, ended, {})
                    continue
                stamp = {"started_at": job.started_at or now(), "updated_at": now()}
                mine = {"status": "running", "worker": worker, "attempt": job.attempt + 1, "beat": 0}
                return self._change(connection, Job, job.id, {**mine, **stamp}, {})
        return None

    def beat(self, job: Job) -> Job:
        """See ``Store.beat``."""
        with self._write() as connection:
            own = self._own(connection, job)
            return self._changed(connection, own, {"beat": own.beat + 1})

    def write_as_worker(self, job: Job, changes: Mapping[str, Any], events: Sequence[Event] = ()) -> Job:
        """See ``Store.write_as_worker``."""
        with self._write() as connection:
            written = self._changed(connection, self._own(connection, job), changes)
            self._append(connection, events)
            return written

    def dump(self) -> Iterator[Record]:
        """See ``Store.dump``."""
        with self._read(self._snapshot) as connection, connection.begin():
            for kind in KINDS:
                table = tables[kind.kind]
                for row in connection.execute(select(table.c.number, table.c.body).order_by(table.c.number)):
                    yield _record(kind, row)

    def load(self, records: Iterable[Record]) -> int:
        """See ``Store.load``."""
        count = 0
        with self._write() as connection:
            for table in tables.values():
                if connection.execute(select(table.c.number).limit(1)).first() is not None:
                    raise Conflict(f"the store is not empty: it has {table.name}")
            for record in records:
                connection.execute(insert(tables[record.kind]).values(number=record.number, **_row(record)))
                count += 1
            if connection.dialect.name == "postgresql":  # SQLite counts on from the largest number by itself
                for table in tables.values():
                    largest = select(func.coalesce(func.max(table.c.number), 0) + 1).scalar_subquery()
                    sequence = func.pg_get_serial_sequence(table.name, "number")
                    connection.execute(select(func.setval(sequence, largest, False)))
        return count

    def close(self) -> None:
        """See ``Store.close``."""
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError as error:
            raise Conflict(f"a field that must be unique is taken: {str(error.orig).splitlines()[0]}") from None
        except (OperationalError, InterfaceError) as error:
            raise _unavailable(error) from None

    @contextmanager
    def _read(self, engine: Engine | None = None) -> Iterator[Connection]:
        try:
            with (engine or self._reader).connect() as connection:
                yield connection
        except (OperationalError, InterfaceError) as error:
            raise _unavailable(error) from None

    def _insert(self, connection: Connection, record: R) -> R:
        table = tables[record.kind]
        number = connection.execute(insert(table).values(**_row(record)).returning(table.c.number)).scalar_one()
        return record.model_copy(update={"number": number})

    def _change(
        self, connection: Connection, kind: type[R], record_id: str, changes: Mapping[str, Any], expect: Mapping[str, Any]
    ) -> R | None:
        table = tables[kind.kind]
        query = select(table.c.number, table.c.body).where(table.c.id == storable(record_id)).with_for_update()
        row = connection.execute(query).first()
        if row is None:
            return None
        record = _record(kind, row)
        for name, wanted in expect.items():
            value = getattr(record, name)
            if value not in wanted if isinstance(wanted, (tuple, list, set, frozenset)) else value != wanted:
                return None
        changed = kind.model_validate({**record.model_dump(), **changes})
        connection.execute(update(table).where(table.c.number == record.number).values(**_row(changed)))
        return changed

    def _changed(self, connection: Connection, job: Job, changes: Mapping[str, Any]) -> Job:
        changed = self._change(connection, Job, job.id, {**changes, "updated_at": now()}, {})
        assert changed is not None
        return changed

    def _own(self, connection: Connection, job: Job) -> Job:
        table = tables[Job.kind]
        query = select(table.c.number, table.c.body).where(table.c.id == job.id, table.c.deleted_at.is_(None)).with_for_update()
        row = connection.execute(query).first()
        own = None if row is None else _record(Job, row)
        if own is None or (own.worker, own.attempt) != (job.worker, job.attempt) or own.status not in _RUNNING:
            raise LeaseLost(f"job {job.id} is no longer attempt {job.attempt} of worker {job.worker!r}")
        return own

    def _append(self, connection: Connection, events: Sequence[Event]) -> None:
        if events:
            connection.execute(insert(tables[Event.kind]), [_row(one) for one in events])

    def _narrowed(self, asked: Select[Any], kind: type[R], query: Query) -> Select[Any]:
        table = tables[kind.kind]
        unknown = set(query.where) - kind.filters
        if unknown:
            raise ValueError(f"{kind.kind} cannot be listed by {', '.join(sorted(unknown))}")
        if query.project is not None:
            asked = asked.where(table.c.project == query.project)
        if not query.with_deleted and "deleted_at" in table.c:
            asked = asked.where(table.c.deleted_at.is_(None))
        for name, value in storable(dict(query.where)).items():
            many = isinstance(value, (tuple, list, set, frozenset))
            asked = asked.where(table.c[name].in_(list(value)) if many else table.c[name] == value)
        for key, value in storable(dict(query.metadata)).items():
            asked = asked.where(table.c.body["metadata"][key].as_string() == value)
        return asked


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except Exception as error:  # noqa: BLE001 -- SQLAlchemy raises several kinds for a text that is no URL
        raise InputError(f"{url!r} is no database URL: {error}; write sqlite:///FILE or postgresql://HOST/NAME") from None
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed)
    if parsed.get_backend_name() == "postgresql" and find_spec("psycopg") is None:
        raise InputError("PostgreSQL needs the package psycopg; pip install 'preftune[postgres]'")
    if parsed.get_backend_name() != "postgresql":
        raise InputError(
            f"database {parsed.get_backend_name()!r} is not supported; write sqlite:///FILE or postgresql://HOST/NAME"
        )
    return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=5, max_overflow=10)


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise InputError("a database in memory would be lost with the process; write sqlite:///FILE")
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    # Connections are kept: opening one and its settings take longer than most queries. There is no limit, for a thread that
    # waits for the writers' lock holds one and would keep readers out.
    engine = create_engine(
        url, poolclass=QueuePool, pool_size=8, max_overflow=-1, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # this module begins transactions itself
        cursor = connection.cursor()
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={int(BUSY_SECONDS * 1000)}"):
            cursor.execute(f"PRAGMA {setting}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes its lock at once: a read that turns into a write would fail where it should have waited.
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("is_reader") else "BEGIN IMMEDIATE")

    return engine


def _unavailable(error: DBAPIError) -> StoreUnavailable:
    return StoreUnavailable(f"the database does not answer: {str(error.orig).strip().splitlines()[0]}")


def _row(record: Record) -> dict[str, Any]:
    body = record.model_dump(mode="json", exclude={"number"})
    own = {name: getattr(record, name) for name in ("id", "project", "created_at", *columns_of(type(record)))}
    return {**own, "body": body}


def _record(kind: type[R], row: Any) -> R:
    return kind.model_validate({**row.body, "number": row.number}, context=STORED)
