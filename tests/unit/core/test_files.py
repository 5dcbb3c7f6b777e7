"""Atomic writes: a reader sees the old content or the new one, whatever happens in between."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from preftune.core.files import append_jsonl, read_json, read_jsonl, remove_leftovers, write_bytes, write_folder, write_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def broken(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "step-1"

    def fill():
        with write_folder(target) as folder:
            (folder / "one").write_text("1")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []
    with write_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"


def test_a_folder_replaces_an_old_one(tmp_path):
    target = tmp_path / "final"
    for text in ("old", "new"):
        with write_folder(target) as folder:
            (folder / text).touch()
    assert [one.name for one in target.iterdir()] == ["new"]
    assert [one.name for one in tmp_path.iterdir()] == ["final"]


def test_a_line_cut_by_a_crash_is_skipped_and_one_in_the_middle_is_not(tmp_path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        read_jsonl(path)


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.json"
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from preftune.core.files import write_json
        number = 0
        while True:
            number += 1
            write_json(Path(sys.argv[1]), {"number": number, "filler": [number] * 5000})
        """
    )
    for delay in (0.0, 0.03, 0.07):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.1 + delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        value = read_json(path)
        assert value["filler"] == [value["number"]] * 5000
    remove_leftovers(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"hello")
    assert os.read(reader, 10) == b"hello"
    os.close(reader)
    assert pipe.is_fifo()
