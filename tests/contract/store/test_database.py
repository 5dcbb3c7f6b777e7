"""What only a database has: it is there after a restart, its migrations make what the code describes."""

import os
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from preftune.core.errors import InputError
from preftune.store.base import Query
from preftune.store.opening import open_store
from preftune.store.records import File
from preftune.store.sql import _engine
from preftune.store.tables import metadata


@pytest.fixture
def database(url):
    if url == "memory:":
        pytest.skip("memory has no database")
    return url


def test_records_outlive_the_process(database):
    store = open_store(database)
    kept = store.insert(File(id="file-1", project="p", filename="a", purpose="fine-tune"))
    store.close()
    again = open_store(database)
    assert again.get(File, "file-1") == kept
    assert again.insert(File(id="file-2", project="p", filename="b", purpose="fine-tune")).number > kept.number
    again.close()


def test_migrations_make_the_tables_that_the_code_describes(database):
    open_store(database).close()
    engine = _engine(database)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert set(inspect(connection).get_table_names()) == set(metadata.tables) | {"alembic_version"}
    engine.dispose()


def test_a_planted_difference_is_seen(database):
    open_store(database).close()
    engine = _engine(database)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_files_purpose"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) != []
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(database):
    open_store(database).close()
    engine = _engine(database)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(InputError, match="newer version"):
        open_store(database)


def test_processes_that_start_at_once_all_find_the_tables(database):
    code = (
        "import sys; from preftune.store.opening import open_store; from preftune.store.records import File, new_id\n"
        "s = open_store(sys.argv[1]); s.insert(File(id=new_id('file-'), project='p', filename='a', purpose='x')); s.close()"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, database], env=os.environ, stderr=subprocess.PIPE) for _ in range(3)]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    store = open_store(database)
    assert store.count(File, Query("p")) == 3
    store.close()


@pytest.mark.parametrize("wrong", ["mysql://x/y", "no url at all", "sqlite://"])
def test_other_urls_are_one_clear_line(wrong):
    with pytest.raises(InputError, match="write sqlite:///FILE"):
        open_store(wrong)
