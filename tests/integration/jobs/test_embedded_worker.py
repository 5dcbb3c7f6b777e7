"""The worker of a server ends with it, also where the server died while it was starting; where it dies, it is started again."""

import os
import signal
import subprocess
import sys
import time

import psutil

from preftune.app import serve


def test_a_worker_whose_server_is_gone_ends(tmp_path):
    places = {"PREFTUNE_HOME": str(tmp_path / "home"), "PREFTUNE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **places, "PREFTUNE_EMBEDDED": "1"}  # process 1 is not who started it
    environment.pop("PREFTUNE_DATABASE", None)
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "worker"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def workers():
    return [
        child for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "worker" in child.cmdline()
    ]  # fmt: skip


def test_a_worker_that_dies_is_started_again_and_ends_with_its_server(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PREFTUNE_DATABASE", raising=False)
    said = []
    embedded = serve.EmbeddedWorker(1, said.append)
    try:
        (first,) = workers()
        os.kill(first.pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while not (found := [one for one in workers() if one.pid != first.pid]):
            assert time.monotonic() < end, "it was not started again"
            time.sleep(0.05)
        assert len(found) == 1
        assert len(said) == 1
        assert "ended with code -9; it is started again" in said[0]
    finally:
        embedded.stop(60)
    assert workers() == []
    assert len(said) == 1, "its own end is no accident"
