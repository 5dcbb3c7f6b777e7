"""The database locked, stopped, on a full disk; the clock wrong. Each time the job is done in the end, with nothing lost."""

import contextlib
import datetime
import json
import os
import sqlite3
import subprocess
import threading
import time

import pytest

from postgres_server import PostgresServer
from preftune.app.context import Context
from preftune.app.jobs import states, worker
from preftune.app.jobs.files import receive
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.store import records, sql
from preftune.store.base import StoreUnavailable
from preftune.store.records import Job, new_id

STEPS = 8


def made_job(platform, rows):
    """A job of eight steps with four checkpoints, submitted."""
    project = platform.project(DEFAULT_PROJECT).id
    file = receive(platform, project, "pairs.jsonl", "fine-tune", rows)
    stage = {
        "method": "dpo", "lr": 1e-4, "adapter": "full", "pairs_per_step": 4, "epochs": 4, "max_steps": STEPS, "checkpoints": 4,
        "data": {"train": [file.id]},
    }  # fmt: skip
    recipe = {"model": {"name": "starter"}, "stages": [stage]}
    job = Job(id=new_id("ft-"), project=project, work="train", model="starter", name="tuned", files=(file.id,), recipe=recipe)
    return states.submit(platform, job)


def opened(folder, database=None):
    platform = Platform.open(Context(folder / "cache", folder / "home"), database=database)
    add_base_model(platform, "starter", "starter")
    return platform


@pytest.fixture
def rows():
    from importlib.resources import files

    return (files("preftune") / "starter" / "pairs.jsonl").read_bytes().splitlines(keepends=True)[:24]


@pytest.fixture
def working():
    """Runs a worker in a thread until the test ends, as ``preftune worker`` does."""
    stop, threads = threading.Event(), []

    def call(platform, **options):
        made = worker.Worker(platform, lease=options.pop("lease", 5.0), **options)
        thread = threading.Thread(target=made.run, args=(stop.is_set,))
        threads.append(thread)
        thread.start()
        return thread

    yield call
    stop.set()
    for thread in threads:
        thread.join(150)


def wait(condition, seconds=240):
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except StoreUnavailable:
            pass
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def check_done(platform, job):
    """Succeeded, every step trained once and told once."""
    ended = platform.store.get(Job, job.id)
    assert ended.status == "succeeded", ended.error
    path = platform.home / "jobs" / job.id / "run/stages/1-dpo/metrics.jsonl"
    trained = [row["step"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    assert trained == list(range(1, STEPS + 1))
    from preftune.store.base import Query
    from preftune.store.records import Event

    told = platform.store.page(Event, Query(None, {"subject": job.id, "type": "metrics"}, limit=1000, is_newest_first=False))
    assert [one.step for one in told.items if "loss" in one.data["metrics"]] == trained


@pytest.mark.slow
def test_a_locked_database_is_waited_for(tmp_path, rows, working, monkeypatch):
    monkeypatch.setattr(sql, "BUSY_SECONDS", 0.2)
    platform = opened(tmp_path)
    job = made_job(platform, rows)
    thread = working(platform)
    wait(lambda: platform.store.get(Job, job.id).progress.get("step", 0) >= 1)
    other = sqlite3.connect(tmp_path / "home" / "preftune.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match="locked"):
        states.cancel(platform, job)
    time.sleep(3)
    assert thread.is_alive(), "the worker gave up"
    other.execute("ROLLBACK")
    other.close()
    wait(lambda: platform.store.get(Job, job.id).status in {"succeeded", "failed"})
    check_done(platform, job)


@pytest.mark.slow
def test_a_stopped_postgresql_is_waited_for(tmp_path, rows, working):
    server = PostgresServer()
    try:
        platform = opened(tmp_path, server.new_database())
        job = made_job(platform, rows)
        thread = working(platform)
        wait(lambda: platform.store.get(Job, job.id).progress.get("step", 0) >= 1)
        server.stop()  # at once, without a word to its clients
        with pytest.raises(StoreUnavailable):
            platform.store.get(Job, job.id)
        time.sleep(2)
        assert thread.is_alive(), "the worker gave up"
        server.start()
        wait(lambda: platform.store.get(Job, job.id).status in {"succeeded", "failed"})
        check_done(platform, job)
        assert platform.store.get(Job, job.id).attempt == 1
        platform.store.close()
    finally:
        server.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leaving):
    """A file that takes all of a disk but so many bytes, whoever else writes there."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while (space := os.statvfs(folder)).f_bavail * space.f_frsize > leaving:
            file.write(bytes(1 << 20))
            file.flush()
    short = leaving - space.f_bavail * space.f_frsize
    os.truncate(ballast, max(0, ballast.stat().st_size - max(0, short)))
    return ballast


@pytest.mark.slow
def test_a_full_disk_fails_the_job_with_the_way_out_and_a_retry_completes_it(small_disk, rows, working):
    platform = opened(small_disk)
    job = made_job(platform, rows)
    wait(lambda: platform.store.get(Job, job.id) is not None)
    working(platform)
    wait(lambda: (platform.home / "jobs" / job.id / "run/stages/1-dpo/checkpoints/step-000002").is_dir())
    ballast = fill(small_disk, leaving=5_000_000)  # less than a checkpoint needs, enough for the database
    wait(lambda: platform.store.get(Job, job.id).status in {"succeeded", "failed"})
    ended = platform.store.get(Job, job.id)
    assert ended.status == "failed"
    assert "cannot be written" in ended.error["message"] or "No space left" in ended.error["message"]
    ballast.unlink()
    states.retry(platform, ended, "space was made")
    wait(lambda: platform.store.get(Job, job.id).status in {"succeeded", "failed"})
    check_done(platform, job)


@pytest.mark.slow
def test_a_clock_that_jumps_takes_no_job_away(tmp_path, rows, working, monkeypatch):
    days = iter(range(10**9))

    def wrong():
        # a day forwards, two backwards, three forwards ...
        day = next(days)
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=day if day % 2 else -day)

    platform = opened(tmp_path)
    job = made_job(platform, rows)
    for module in (records, sql, worker, states):
        monkeypatch.setattr(module, "now", wrong)
    monkeypatch.setattr(time, "time", lambda: wrong().timestamp())
    working(platform, name="one")
    working(platform, name="two")
    wait(lambda: platform.store.get(Job, job.id).status in {"succeeded", "failed"})
    check_done(platform, job)
    assert platform.store.get(Job, job.id).attempt == 1
