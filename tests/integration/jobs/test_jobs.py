"""Jobs from upload to model, with a real worker and real training; cancelled, paused, killed, taken over."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from preftune.app.jobs import states
from preftune.app.jobs.files import receive
from preftune.app.jobs.worker import Worker
from preftune.core.errors import InputError, UsageError
from preftune.store.base import Query
from preftune.store.records import Event, File, Job, ModelVersion


def now_of(platform, job):
    return platform.store.get(Job, job.id)


def events_of(platform, job):
    return list(platform.store.page(Event, Query(None, {"subject": job.id}, limit=1000, is_newest_first=False)).items)


@pytest.mark.slow
def test_a_job_waits_for_its_file_then_trains_and_leaves_models(platform, project, submit, worker, until, pairs):
    job = submit()
    assert job.status == "validating"
    until(worker, lambda: now_of(platform, job).status in {"succeeded", "failed"})
    ended = now_of(platform, job)
    assert ended.status == "succeeded", ended.error
    file = platform.store.get(File, pairs.id)
    assert (file.status, file.num_rows, file.report["valid"]) == ("processed", 24, True)
    models = platform.store.page(ModelVersion, Query(project, {"job": job.id}, is_newest_first=False)).items
    assert models[-1].name == "tuned"
    assert {model.name for model in models[:-1]} <= {"tuned:1", "tuned:2", "tuned:3"}
    assert all((Path(model.run) / "config.json").is_file() for model in models)
    told = events_of(platform, job)
    steps = [one.step for one in told if one.type == "metrics" and "loss" in one.data["metrics"]]
    assert steps == [1, 2, 3]
    assert [one.type for one in told if one.type in {"created", "queued", "started", "succeeded"}] == [
        "created", "queued", "started", "succeeded",
    ]  # fmt: skip
    assert not (platform.home / "jobs" / job.id / "error.json").exists()


@pytest.mark.slow
def test_a_paused_job_goes_on_where_it_was_and_a_cancelled_one_ends(platform, submit, worker, until):
    job = submit(stage={"epochs": 400, "max_steps": 400, "checkpoints": 0})
    until(worker, lambda: now_of(platform, job).progress.get("step", 0) >= 2)
    states.pause(platform, job)
    until(worker, lambda: now_of(platform, job).status == "paused")
    steps = now_of(platform, job).progress["step"]
    assert worker.num_running == 0
    states.resume(platform, now_of(platform, job))
    until(worker, lambda: now_of(platform, job).progress["step"] > steps)
    told = [one.step for one in events_of(platform, job) if one.type == "metrics" and "loss" in one.data["metrics"]]
    assert told == sorted(set(told))
    states.cancel(platform, job)
    until(worker, lambda: now_of(platform, job).status == "cancelled")
    with pytest.raises(states.WrongState, match="nothing to cancel"):
        states.cancel(platform, now_of(platform, job))
    states.delete(platform, now_of(platform, job))
    assert now_of(platform, job) is None


@pytest.mark.slow
def test_a_killed_process_goes_on_from_its_checkpoint(platform, submit, worker, until):
    job = submit(stage={"epochs": 4, "max_steps": 12, "checkpoints": 6})
    until(worker, lambda: any(one.type == "checkpoint" for one in events_of(platform, job)))
    process = next(iter(worker._running.values())).process
    os.killpg(process.pid, signal.SIGKILL)
    until(worker, lambda: now_of(platform, job).status in {"succeeded", "failed"})
    ended = now_of(platform, job)
    assert ended.status == "succeeded", ended.error
    assert ended.attempt == 2
    path = platform.home / "jobs" / job.id / "run/stages/1-dpo/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


@pytest.mark.slow
def test_a_dead_worker_loses_its_job_to_another_and_cannot_write(platform, submit, until):
    first, second = Worker(platform, lease=2.0), Worker(platform, lease=2.0)
    job = submit(stage={"epochs": 400, "max_steps": 400, "checkpoints": 0})
    until(first, lambda: now_of(platform, job).progress.get("step", 0) >= 1)
    # the first worker goes silent; the second waits for a lease, and for the first one's process to let go of the folder
    process = next(iter(first._running.values())).process
    end = time.monotonic() + 60
    while now_of(platform, job).worker != second.name:
        assert time.monotonic() < end
        second.tick()
        time.sleep(0.05)
    assert process.poll() is None
    first.tick()  # wakes up, finds that the job is no longer its own, and ends its process
    assert process.poll() is not None
    assert first.num_running == 0
    step = now_of(platform, job).progress.get("step", 0)
    until(second, lambda: now_of(platform, job).progress.get("step", 0) > step)
    states.cancel(platform, job)
    until(second, lambda: now_of(platform, job).status == "cancelled")
    first.stop()
    second.stop()


def test_a_file_that_is_no_data_fails_its_jobs_with_the_reason(platform, project, submit, worker, until):
    bad = receive(platform, project, "bad.jsonl", "fine-tune", [b'{"prompt": "x"', b"\n[1]\n"])
    job = submit(files=(bad.id,))
    until(worker, lambda: now_of(platform, job).status != "validating")
    ended = now_of(platform, job)
    assert ended.status == "failed"
    assert ended.error["param"] == "training_file"
    report = platform.store.get(File, bad.id).report
    assert report["valid"] is False
    assert str(platform.home) not in json.dumps(report)
    with pytest.raises(UsageError, match="cannot be used"):
        submit(files=(bad.id,))


def test_a_doomed_job_fails_with_preflights_words(platform, submit, worker, until):
    job = submit(stage={"data": {"train": []}, "lr": 1e-4, "max_steps": 1})
    # the starter's pairs are raw text; conversations without a template would be refused before the first step
    platform.store.change(Job, job.id, {"recipe": {**job.recipe, "model": {"name": "nothing"}}})
    until(worker, lambda: now_of(platform, job).status in {"succeeded", "failed"})
    ended = now_of(platform, job)
    assert ended.status == "failed"
    assert "there is no model 'nothing'" in ended.error["message"]
    again = states.retry(platform, ended, "the model was added")
    assert again.status == "queued"


def test_the_same_key_gives_the_same_job_and_another_request_is_refused(platform, submit):
    one = submit(idempotency="k", request={"a": 1})
    two = submit(idempotency="k", request={"a": 1})
    assert one.id == two.id
    with pytest.raises(UsageError, match="was used for another request"):
        submit(idempotency="k", request={"a": 2})


def test_files_of_no_use_are_refused_at_once(platform, project):
    for name, rows in (("a.exe", [b"x"]), ("../../x.txt", [b"x"]), ("a.jsonl", [])):
        with pytest.raises(InputError):
            receive(platform, project, name, "fine-tune", rows)
    assert platform.store.count(File, Query(None)) == 0
    assert not list((platform.home / "artifacts").rglob("file-*"))
