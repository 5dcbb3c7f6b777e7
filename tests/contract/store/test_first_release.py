"""A database that the first server wrote is brought up to date with nothing lost, and works on.

``first_release.jsonl`` holds its rows, table by table, as commit 5ae5f9c wrote them: a file, a job that succeeded, one that
waits, their events and models, and a record of every other kind that it knew.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import MetaData, insert

from preftune.app.recipes import check_recipe
from preftune.store.base import Query
from preftune.store.migrate import upgrade
from preftune.store.opening import open_store
from preftune.store.records import KINDS, Event, Job, ModelVersion, Webhook, now
from preftune.store.sql import _engine

ROWS = [json.loads(line) for line in Path(__file__).with_name("first_release.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def database(url):
    """The URL of a database at its first revision, filled as the first server left it."""
    if url == "memory:":
        pytest.skip("memory has no database")
    engine = _engine(url)
    upgrade(engine, "0001")
    tables = MetaData()
    with engine.begin() as connection:
        tables.reflect(connection)
        for row in ROWS:
            times = {name: _time(row[name]) for name in ("created_at", "deleted_at") if name in row}
            values = {name: value for name, value in row.items() if name != "table"} | times
            connection.execute(insert(tables.tables[row["table"]]).values(**values))
        if connection.dialect.name == "postgresql":
            for name in {row["table"] for row in ROWS}:
                connection.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{name}', 'number'), (SELECT max(number) FROM {name}))"
                )
    engine.dispose()
    return url


def _time(text):
    return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_every_record_is_there_as_it_was(database):
    store = open_store(database)
    for kind in KINDS:
        wanted = [row for row in ROWS if row["table"] == kind.kind]
        found = store.page(kind, Query(None, limit=100, is_newest_first=False, with_deleted=True)).items
        assert [one.id for one in found] == [row["id"] for row in wanted]
        for one, row in zip(found, wanted, strict=True):
            shown = one.model_dump(mode="json")
            assert {name: shown[name] for name in row["body"]} == row["body"]
    store.close()


def test_its_jobs_and_lists_work_on(database):
    store = open_store(database)
    done, waiting = (store.page(Job, Query(None, {"status": one, "work": "train"})).items[0] for one in ("succeeded", "queued"))
    assert store.count(Event, Query(done.project, {"subject": done.id, "type": "metrics"})) == 2
    assert store.page(ModelVersion, Query(done.project, {"job": done.id})).items[0].name == done.name
    claimed = store.claim("today's worker", work=["train"], slots=1, lost={})
    assert (claimed.id, claimed.attempt, claimed.has_attempts_left) == (waiting.id, 1, True)
    check_recipe(claimed.recipe)
    hook = store.page(Webhook, Query(None)).items[0]
    assert store.change(Webhook, hook.id, {"deleted_at": now()}).deleted_at is not None
    assert store.count(Webhook, Query(None)) == 0
    fresh = store.insert(Job(id="ft-new", project=done.project, work="train"))
    assert fresh.number > waiting.number
    store.close()
