"""Every back end of the store, the real PostgreSQL among them; each test gets an empty one."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from preftune.store.opening import open_store


def programs():
    found = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    onpath = shutil.which("initdb")
    return Path(onpath).parent if onpath else max(found).parent if found else None


@pytest.fixture(scope="session")
def postgres():
    """A server of its own on a socket; skips with a reason where PostgreSQL is not installed."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    # not below pytest's own folder: another test run beside this one clears that while the server lives in it
    data = Path(tempfile.mkdtemp(prefix="preftune-postgres-"))
    run = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(data, "postgres")
        run = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    call = lambda *command: subprocess.run([*run, *map(str, command)], check=True, capture_output=True, cwd="/")
    call(folder / "initdb", "-D", data / "db", "-U", "test", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={data} -c fsync=off"
    call(folder / "pg_ctl", "-D", data / "db", "-l", data / "log", "-w", "-o", options, "start")
    yield data
    call(folder / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop")
    shutil.rmtree(data)


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "memory":
        return "memory:"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    import psycopg

    data = request.getfixturevalue("postgres")
    name = "t" + os.urandom(6).hex()
    with psycopg.connect(host=str(data), user="test", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://test@/{name}?host={data}"


@pytest.fixture
def store(url):
    opened = open_store(url)
    yield opened
    opened.close()
