"""A PostgreSQL server of a test's own, on a socket in a folder of its own."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def programs():
    """The folder of initdb, or None."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    onpath = shutil.which("initdb")
    return Path(onpath).parent if onpath else max(found).parent if found else None


class PostgresServer:
    """Started when made; skips the test with a reason where PostgreSQL is not installed."""

    def __init__(self):
        self._programs = programs()
        if self._programs is None:
            pytest.skip("PostgreSQL is not installed (apt install postgresql)")
        # not below pytest's own folder: another test run beside this one clears that while the server lives in it
        self.data = Path(tempfile.mkdtemp(prefix="preftune-postgres-"))
        self._prefix = []
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(self.data, "postgres")
            self._prefix = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        self._call("initdb", "-D", self.data / "db", "-U", "test", "-A", "trust", "--no-sync")
        self.start()

    def _call(self, program, *words):
        command = [*self._prefix, self._programs / program, *words]
        subprocess.run([str(word) for word in command], check=True, capture_output=True, cwd="/")

    def start(self):
        options = f"-c listen_addresses='' -c unix_socket_directories={self.data} -c fsync=off"
        self._call("pg_ctl", "-D", self.data / "db", "-l", self.data / "log", "-w", "-o", options, "start")

    def stop(self):
        self._call("pg_ctl", "-D", self.data / "db", "-m", "immediate", "stop")

    def new_database(self):
        """The URL of an empty database."""
        import psycopg

        name = "t" + os.urandom(6).hex()
        with psycopg.connect(host=str(self.data), user="test", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://test@/{name}?host={self.data}"

    def close(self):
        self.stop()
        shutil.rmtree(self.data)
