"""Uploads that break: cut by the network, slower than anybody waits for, larger than they said. Nothing stays behind."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import threading
import time
from urllib.parse import urlsplit

import anyio
import pytest
import uvicorn
from starlette.testclient import TestClient

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.server import uploads
from preftune.server.app import create_app
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore


def request_of(served, length, body=b""):
    """The head of an upload that says its length, and the beginning of its body."""
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {served.key}\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
    )
    return head.encode() + body


BEGIN = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
ROW = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"


def left_behind(served):
    kept = [path for path in (served.home / "state" / "artifacts").rglob("*") if path.is_file()]
    return sorted(path.name for path in kept)


def test_an_upload_that_is_cut_leaves_nothing_and_can_be_sent_again(served):
    place = urlsplit(served.url)
    before, names = left_behind(served), {row["id"] for row in served.ask("/v1/files")[1]["data"]}
    for sent in (0, 1, 50_000, 3_000_000):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(request_of(served, 4_000_000, (BEGIN + ROW * 60_000)[:sent]))
            time.sleep(0.2)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a goodbye
    time.sleep(0.5)
    assert left_behind(served) == before
    assert {row["id"] for row in served.ask("/v1/files")[1]["data"]} == names
    whole = BEGIN + ROW * 10 + b"\r\n--b--\r\n"
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, len(whole), whole))
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    assert len(left_behind(served)) == len(before) + 1


def test_a_body_longer_than_it_said_or_without_an_end_is_refused(served):
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, 60 << 30))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413")
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(request_of(served, "12 34").replace(b"Content-Length: 12 34", b"Content-Length: -5"))
        assert connection.recv(65_536).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


@pytest.fixture
def installed(tmp_path):
    """An installation in memory, its application and an admin's key."""

    def call(artifacts=None):
        folder = artifacts or tmp_path / "artifacts"
        platform = Platform(MemoryStore(), Artifacts(str(folder)), tmp_path, Context(tmp_path / "cache", tmp_path))
        _, key = add_key(platform, platform.project(DEFAULT_PROJECT).id, "test", "admin")
        return platform, create_app(platform, ServerSettings()), key

    return call


@contextlib.contextmanager
def listening(app):
    """The application behind a real socket of this process; its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who connects before the server runs waits for it
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.mark.parametrize("path", ["/v1/files", "/api/v1/files?filename=a.jsonl"])
def test_who_sends_a_byte_now_and_then_is_not_waited_for(installed, monkeypatch, path):
    monkeypatch.setattr(uploads, "SILENCE_SECONDS", 0.5)
    platform, app, key = installed()
    kind = "multipart/form-data; boundary=b" if path == "/v1/files" else "application/octet-stream"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\n"
    with listening(app) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + (BEGIN if path == "/v1/files" else b""))
        began, answer = time.monotonic(), b""
        connection.setblocking(False)
        while not answer and time.monotonic() < began + 20:
            with contextlib.suppress(OSError):
                connection.send(b"{")  # never silent for long, and never done
            time.sleep(0.1)
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 408"), answer[:300]
    assert b"less than 16,384 bytes were sent in 0.5 s; send the upload again" in answer
    assert time.monotonic() - began < 10
    assert [file for file in (platform.home / "artifacts").rglob("*") if file.is_file()] == []


def test_only_the_senders_time_counts(monkeypatch):
    monkeypatch.setattr(uploads, "SILENCE_SECONDS", 0.2)

    async def receive():
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def slow_disk():
        paced = uploads._Paced(receive)
        for _ in range(5):
            await paced.take()
            await anyio.sleep(0.1)

    anyio.run(slow_disk)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_in_one_line_and_keeps_nothing(installed, full_disk):
    _, app, key = installed(full_disk)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        for answer in (
            client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", ROW * 60_000)}),
            client.post("/api/v1/files?filename=a.jsonl", content=ROW * 60_000),
        ):
            assert answer.status_code == 507
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["code"] == "disk_full"
            assert "its operator has to make room" in answer.json()["error"]["message"]
        assert client.get("/v1/files").json()["data"] == []
        assert [path for path in full_disk.rglob("*") if path.is_file()] == []
        assert client.post("/api/v1/files?filename=a.jsonl", content=ROW).status_code == 201, "a small one fits"


def test_another_error_of_the_system_is_a_bug_of_ours(installed, monkeypatch):
    platform, app, key = installed()

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/srv/secret/place")

    monkeypatch.setattr(Artifacts, "put", broken)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/api/v1/files?filename=a.jsonl", content=ROW, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 500
    assert "/srv/secret" not in answer.text
    assert platform.home.name not in answer.text
