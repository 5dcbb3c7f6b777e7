"""What would end a worker, and so the jobs of everybody: the store silent at the wrong moment, one job that cannot be read."""

import json
import subprocess

import pytest

from preftune.app.jobs import states
from preftune.app.jobs.files import receive
from preftune.app.jobs.follow import EVENTS_AT_ONCE, follow
from preftune.app.jobs.uploads import announce
from preftune.app.jobs.worker import Running, Worker
from preftune.core.errors import Interrupted
from preftune.store.base import Query, StoreUnavailable
from preftune.store.records import Event, Job, new_id


class Silent:
    """A store that does not answer for some calls of one method."""

    def __init__(self, store, method, times):
        self._store, self._method, self.left = store, method, times

    def __getattr__(self, name):
        found = getattr(self._store, name)
        if name != self._method:
            return found

        def call(*given, **named):
            if self.left:
                self.left -= 1
                raise StoreUnavailable("the database does not answer: database is locked")
            return found(*given, **named)

        return call


@pytest.fixture
def silence(platform):
    def call(method, times):
        real = platform.store
        silent = Silent(real, method, times)
        object.__setattr__(platform, "store", silent)  # the installation is frozen, and nobody else holds this one
        return silent

    return call


def queued(platform, project):
    """A job that needs no file."""
    return platform.store.insert(Job(id=new_id("ft-"), project=project, work="train", status="queued", model="nothing"))


def events_of(platform, job):
    return platform.store.page(Event, Query(None, {"subject": job.id}, limit=5000, is_newest_first=False)).items


def ended(worker, job, code, folder):
    """The job as if its process had just ended with a code."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(["sh", "-c", f"exit {code}"], start_new_session=True)
    process.wait()
    worker._running[job.id] = Running(job, process, 0.0)


def test_a_job_that_was_claimed_as_the_store_fell_silent_is_started_when_it_is_back(platform, submit, worker, until, silence):
    job = submit()
    validator = Worker(platform, slots=0)  # it trains nothing
    until(validator, lambda: platform.store.get(Job, job.id).status == "queued")
    validator.stop()
    silent = silence("write_as_worker", 2)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            worker.tick()
    assert silent.left == 0
    assert worker.num_running == 0, "no process that the store knows nothing of"
    worker.tick()
    assert worker.num_running == 1
    now = platform.store.get(Job, job.id)
    assert (now.status, now.attempt, now.error) == ("running", 1, {})


def test_an_unstarted_job_is_given_back_by_a_worker_that_stops(platform, pairs, worker, silence):
    silence("write_as_worker", 1)
    with pytest.raises(StoreUnavailable):
        worker.tick()
    worker.stop()
    (job,) = platform.store.page(Job, Query(None, {"work": "validate"})).items
    assert job.files == (pairs.id,)
    assert (job.status, job.worker, job.has_attempts_left) == ("queued", "", True)


def test_how_a_process_ended_is_told_when_the_store_is_back(platform, project, worker, silence):
    queued(platform, project)
    job = platform.store.claim(worker.name, work=["train"], slots=1, lost={})
    platform.job_folder(job.id).mkdir(parents=True)
    (platform.job_folder(job.id) / "error.json").write_text(json.dumps({"code": "blocked", "message": "no such thing"}))
    ended(worker, job, 1, platform.job_folder(job.id))
    silence("write_as_worker", 2)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            worker.tick()
    worker.tick()
    now = platform.store.get(Job, job.id)
    assert (now.status, now.attempt, now.error["code"]) == ("failed", 1, "blocked")
    assert worker.num_running == 0


def test_all_that_a_process_wrote_is_told_when_it_has_ended(platform, project, worker):
    queued(platform, project)
    job = platform.store.claim(worker.name, work=["train"], slots=1, lost={})
    stage = platform.job_folder(job.id) / "run" / "stages" / "1-dpo"
    stage.mkdir(parents=True)
    steps = 3 * EVENTS_AT_ONCE + 7
    (stage / "metrics.jsonl").write_text("".join(json.dumps({"step": k, "loss": 0.5}) + "\n" for k in range(1, steps + 1)))
    ended(worker, job, Interrupted.exit_code, platform.job_folder(job.id))
    worker.tick()
    told = [one.step for one in events_of(platform, job) if one.type == "metrics"]
    assert told == list(range(1, steps + 1))
    assert platform.store.get(Job, job.id).forgiven == job.attempt, "it got further than ever"


def test_deaths_at_the_same_place_end_a_job_and_others_do_not(platform, project, worker):
    job = queued(platform, project)
    stage = platform.job_folder(job.id) / "run" / "stages" / "1-dpo"
    stage.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2)]
    for attempt in range(1, 6):
        mine = platform.store.claim(worker.name, work=["train"], slots=1, lost={})
        assert mine.attempt == attempt
        (stage / "metrics.jsonl").write_text("".join(lines[:attempt]))  # the first two attempts get a step further each
        ended(worker, mine, 9, platform.job_folder(job.id))
        worker._look_after(worker._running[job.id])
        now = platform.store.get(Job, job.id)
        assert (now.status, now.forgiven) == ("queued" if attempt < 5 else "failed", min(attempt, 2))
    assert "died 3 times without getting any further" in now.error["message"]


def test_a_job_that_cannot_be_started_fails_alone(platform, project, worker):
    job = queued(platform, project)  # its recipe is empty, which nothing that creates jobs lets through
    worker.tick()
    failed = platform.store.get(Job, job.id)
    assert (failed.status, failed.error["code"]) == ("failed", "cannot_start")


def test_a_job_that_cannot_be_looked_after_fails_alone(platform, project, worker):
    job, other = queued(platform, project), queued(platform, project)
    for one in (job, other):
        claimed = platform.store.claim(worker.name, work=["train"], slots=1, lost={})
        ended(worker, claimed, Interrupted.exit_code, platform.job_folder(one.id))
    stage = platform.job_folder(job.id) / "run" / "stages" / "1-dpo"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("no JSON at all\n")
    worker.tick()
    failed = platform.store.get(Job, job.id)
    assert (failed.status, failed.error["code"]) == ("failed", "internal_error")
    assert "could not go on with it" in failed.error["message"]
    assert [one.type for one in events_of(platform, other)][:1] == ["requeued"]


def test_jobs_whose_files_never_come_keep_nobody_waiting(platform, project, submit, worker):
    ghost = announce(platform, project, "never.jsonl", "fine-tune")
    for _ in range(120):
        submit(files=(ghost.id,))
    mine = receive(platform, project, "rows.jsonl", "eval", [b"{}\n"])  # needs no validation
    job = platform.store.insert(
        Job(id=new_id("ft-"), project=project, work="train", status="validating", model="nothing", files=(mine.id,))
    )
    for _ in range(2):
        worker._advance()
    assert platform.store.get(Job, job.id).status == "queued"
    assert platform.store.count(Job, Query(None, {"status": "validating"})) == 120
    states.cancel(platform, job)


def test_a_long_run_is_read_on_and_a_rewritten_one_anew(platform, project, tmp_path, monkeypatch):
    job = queued(platform, project)
    path = tmp_path / "run" / "stages" / "1-dpo" / "metrics.jsonl"
    path.parent.mkdir(parents=True)

    def line(step):
        return json.dumps({"step": step, "loss": 0.5}) + "\n"

    path.write_text("".join(map(line, range(1, 51))))
    told = follow(job, tmp_path / "run", {})
    assert [one.step for one in told.events] == list(range(1, 51))
    read = []
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or real(text))
    with path.open("a") as file:
        file.write(line(51) + line(52)[:9])
    then = job.model_copy(update={"progress": told.progress})
    again = follow(then, tmp_path / "run", told.places)
    assert [one.step for one in again.events] == [51], "half a line is left for the next time"
    assert len([text for text in read if b"loss" in (text if isinstance(text, bytes) else text.encode())]) <= 2
    fresh = path.with_name("fresh")
    fresh.write_text("".join(map(line, range(1, 61))))
    fresh.replace(path)  # as a resumed run writes it: another file
    last = follow(job.model_copy(update={"progress": again.progress}), tmp_path / "run", again.places)
    assert [one.step for one in last.events] == list(range(52, 61))
