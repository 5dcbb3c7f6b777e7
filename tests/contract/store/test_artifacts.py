"""Bytes are kept whole or not at all, and no key reaches outside."""

import hashlib
import subprocess
import time
from pathlib import Path

import pytest

from preftune.app import gc_jobs
from preftune.app.context import Context
from preftune.app.jobs import files
from preftune.app.jobs.platform import Platform
from preftune.core.errors import InputError
from preftune.store.artifacts import Artifacts, TooLarge

MOTO = Path(__file__).resolve().parents[3] / ".venv-s3" / "bin" / "python"
SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("PORT", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3():
    """moto's S3 server in an environment of its own; it ends with its standard input."""
    if not MOTO.is_file():
        pytest.skip("moto's environment is absent: bench/environments/make.sh s3")
    with subprocess.Popen(
        [MOTO, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        port = next(line.split()[1] for line in server.stdout if line.startswith("PORT"))
        yield f"http://127.0.0.1:{port}"
        server.stdin.close()
        server.wait(30)


@pytest.fixture(params=["folder", "memory", "s3"])
def artifacts(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return Artifacts(str(tmp_path / "kept"))
    if request.param == "memory":
        return Artifacts(f"memory://{tmp_path.name}")
    endpoint = request.getfixturevalue("s3")
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    import fsspec

    bucket = f"b{abs(hash(str(tmp_path))) % 10**12}"
    fsspec.filesystem("s3", endpoint_url=endpoint).mkdir(bucket)
    return Artifacts(f"s3://{bucket}/kept", endpoint_url=endpoint)


def test_bytes_come_back_with_their_digest(artifacts):
    stored = artifacts.put("files/a.jsonl", [b"one", b"", b"two"])
    assert (stored.bytes, stored.sha256) == (6, hashlib.sha256(b"onetwo").hexdigest())
    assert b"".join(artifacts.read("files/a.jsonl")) == b"onetwo"
    assert b"".join(artifacts.read("files/a.jsonl", 2, 5)) == b"etw"
    assert artifacts.size("files/a.jsonl") == 6
    artifacts.delete("files/a.jsonl")
    artifacts.delete("files/a.jsonl")
    assert not artifacts.exists("files/a.jsonl")
    with pytest.raises(FileNotFoundError):
        list(artifacts.read("files/a.jsonl"))


def test_an_upload_that_breaks_leaves_nothing_and_does_not_harm_what_was_there(artifacts, tmp_path):
    artifacts.put("x", [b"old"])

    def broken():
        yield b"new"
        raise ConnectionError("the client went away")

    with pytest.raises(ConnectionError):
        artifacts.put("x", broken())
    with pytest.raises(TooLarge, match="more than the 4 bytes"):
        artifacts.put("x", [b"abc", b"de"], max_bytes=4)
    assert b"".join(artifacts.read("x")) == b"old"
    assert not list(tmp_path.rglob(".writing-*"))


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".hidden", "a b", "a\0b", "s3://b/k", "a/.."])
def test_a_key_is_plain_names_only(artifacts, key):
    with pytest.raises(ValueError, match="no artifact key"):
        artifacts.put(key, [b"x"])


def test_a_local_copy_is_the_same_bytes(artifacts, tmp_path):
    artifacts.put("files/b", [b"hello"])
    assert artifacts.local("files/b", tmp_path / "cache").read_bytes() == b"hello"


def test_a_url_that_nothing_knows_is_one_line():
    with pytest.raises(InputError, match="nonsense"):
        Artifacts("nonsense://x")


def test_everything_that_is_kept_is_listed(artifacts):
    artifacts.put("files/a.jsonl", [b"12"])
    artifacts.put("exports/m/merged.tar.gz", [b"123", b"4"])
    entries = list(artifacts.entries())
    assert [(one.key, one.bytes) for one in entries] == [("exports/m/merged.tar.gz", 4), ("files/a.jsonl", 2)]
    assert all(abs(one.modified - time.time()) < 600 for one in entries)
    artifacts.delete("files/a.jsonl")
    assert [one.key for one in artifacts.entries()] == ["exports/m/merged.tar.gz"]


def test_gc_finds_what_no_record_names(artifacts, store, tmp_path, monkeypatch):
    monkeypatch.setattr(gc_jobs, "DAY", -600.0)  # an object store's times cannot be set
    platform = Platform(store, artifacts, tmp_path, Context(tmp_path / "cache", tmp_path))
    project = platform.project("default").id
    named = files.receive(platform, project, "pairs.jsonl", "fine-tune", [b'{"prompt": "a"}\n'])
    artifacts.put("files/stray.jsonl", [b"123"])
    kept = []
    assert [(one.place, one.num_bytes) for one in gc_jobs.forgotten_artifacts(platform, kept)] == [("files/stray.jsonl", 3)]
    assert not kept
    files.delete(platform, named)
    assert not list(gc_jobs.forgotten_artifacts(platform, kept))
    assert "is it the right one?" in kept[0]
