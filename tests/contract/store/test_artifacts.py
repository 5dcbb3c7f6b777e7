"""Bytes are kept whole or not at all, and no key reaches outside."""

import hashlib

import pytest

from preftune.core.errors import InputError
from preftune.store.artifacts import Artifacts, TooLarge


@pytest.fixture(params=["folder", "memory"])
def artifacts(request, tmp_path):
    return Artifacts(str(tmp_path / "kept") if request.param == "folder" else f"memory://{tmp_path.name}")


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
