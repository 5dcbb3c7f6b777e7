"""Packed uploads: ordinary ones are read, one that unpacks to a thousand times its size is refused and costs no memory."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preftune.app.jobs.files import inspect, receive
from preftune.store.records import File

ROW = json.dumps({"prompt": "Say hello.", "chosen": "Hello, friend!", "rejected": "No."}).encode() + b"\n"


MEASURED = """
import json, resource, sys
from preftune.app.jobs.files import inspect

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, bomb, name = sys.argv[1:]
inspect(small, name)
before = peak()
report = inspect(bomb, name)
print(json.dumps({"report": report, "grown": peak() - before}))
"""


def packed(kind, rows):
    return gzip.compress(rows, 6) if kind == "gz" else zstandard.ZstdCompressor().compress(rows)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_is_refused_without_unpacking_it_whole(tmp_path, kind):
    path = tmp_path / f"bomb.jsonl.{kind}"
    path.write_bytes(packed(kind, ROW * 2_500_000))  # 185 MB of one row
    assert path.stat().st_size < 1_000_000
    small = tmp_path / f"small.jsonl.{kind}"
    small.write_bytes(packed(kind, ROW))
    # in a process of its own: this one's memory is also that of the threads of the tests before
    command = [sys.executable, "-c", MEASURED, str(small), str(path), "mine.jsonl." + kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"]["valid"] is False
    assert found["report"]["error"].startswith(f"mine.jsonl.{kind} unpacks to more than 100 times its size; upload it unpacked")
    assert found["grown"] < 50_000_000


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_ordinary_and_small_files_are_read(tmp_path, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    rows = b"".join(ROW.replace(b"hello", b"%d" % number) for number in range(1000))
    path.write_bytes(packed(kind, rows))
    report = inspect(str(path), "a")
    assert (report["valid"], report["num_rows"]) == (True, 1000)
    path.write_bytes(packed(kind, rows)[:-9])
    assert inspect(str(path), "a")["valid"] is False


def table(path, batches, text):
    """A Parquet file of so many batches of 100,000 equal rows."""
    rows = pa.table({name: [text] * 100_000 for name in ("prompt", "chosen", "rejected")})
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for _ in range(batches):
            writer.write_table(rows)


def test_a_table_of_one_row_a_million_times_is_refused(tmp_path):
    bomb, small = tmp_path / "bomb.parquet", tmp_path / "small.parquet"
    table(bomb, 20, "a few words that take no room")
    assert bomb.stat().st_size < 1_000_000
    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}), small)
    command = [sys.executable, "-c", MEASURED, str(small), str(bomb), "mine.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"]["error"].startswith("mine.parquet unpacks to more than 100 times its size")
    assert found["grown"] < 100_000_000


def test_a_table_of_one_huge_text_is_refused_by_what_it_says_of_itself(tmp_path):
    path = tmp_path / "huge.parquet"
    text = "x" * 80_000_000
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [text], "rejected": ["b"]}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    assert "unpacks to more than 100 times" in inspect(str(path), "huge.parquet")["error"]


def test_an_ordinary_table_is_read_and_a_broken_one_told_of(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: [f"{name} {k}" for k in range(5000)] for name in ("prompt", "chosen", "rejected")}), path)
    report = inspect(str(path), "a.parquet")
    assert (report["valid"], report["num_rows"]) == (True, 5000)
    path.write_bytes(path.read_bytes()[:-50])
    assert "no readable Parquet file" in inspect(str(path), "a.parquet")["error"]


def test_the_server_says_so_of_an_uploaded_one(platform, project, worker, until):
    bomb = receive(platform, project, "bomb.jsonl.gz", "fine-tune", [packed("gz", ROW * 2_500_000)])
    until(worker, lambda: platform.store.get(File, bomb.id).status in {"processed", "error"})
    file = platform.store.get(File, bomb.id)
    assert file.status == "error"
    assert "bomb.jsonl.gz unpacks to more than 100 times" in file.report["error"]
