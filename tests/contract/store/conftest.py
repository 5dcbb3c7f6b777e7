"""Every back end of the store, the real PostgreSQL among them; each test gets an empty one."""

import pytest

from postgres_server import PostgresServer
from preftune.store.opening import open_store


@pytest.fixture(scope="session")
def postgres():
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "memory":
        return "memory:"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def store(url):
    opened = open_store(url)
    yield opened
    opened.close()
