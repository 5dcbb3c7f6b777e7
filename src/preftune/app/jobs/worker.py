"""The worker: claims jobs, runs each in a process group of its own, tells the store what happens, survives anything.

A worker holds no state that matters. Whoever kills it loses nothing: its children are told by the kernel to checkpoint and
end, and once its beat has stood still for a lease another worker goes on from the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.app.grading import contests as grading
from preftune.app.jobs import child, evaluations, exports, files, reporting, states
from preftune.app.jobs.exports import export_task, keep_archive
from preftune.app.jobs.follow import Places, follow, named_stages, run_record, without_paths
from preftune.app.jobs.models import register_models, resolve
from preftune.app.jobs.platform import Platform, event
from preftune.core.errors import Interrupted, PreftuneError
from preftune.core.files import read_json, write_json
from preftune.store.base import LeaseLost, Query, StoreUnavailable
from preftune.store.records import File, Job, now

LEASE_SECONDS = 30.0
TICK_SECONDS = 0.5
STOP_SECONDS = 120.0
SLOTLESS = ("validate", "export")  # short work that takes no slot, so that nobody waits for a training to end
MAX_SLOTLESS = 2
MAX_SILENCE = 600.0

log = logging.getLogger("preftune.worker")


@dataclass(slots=True)
class Running:
    """A job and its process. asked_at: when it was asked to stop, by this process's clock. places: how far its run was told."""

    job: Job
    process: subprocess.Popen[bytes]
    beaten_at: float
    asked_at: float | None = None
    places: Places = field(default_factory=dict)


class Worker:
    """One worker of an installation.

    Parameters
        slots: CPU slots or GPUs it may give away; validations take none.
        lease: seconds after which a beat that stands still means that its worker is dead; a worker beats six times in it.
    """

    def __init__(self, platform: Platform, *, slots: int = 1, lease: float = LEASE_SECONDS, name: str | None = None) -> None:
        self.platform = platform
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._slots, self._lease = slots, lease
        self._running: dict[str, Running] = {}
        self._claimed: Job | None = None  # and not started yet, because the store fell silent
        self._advanced: str | None = None  # the last job whose files were looked at in this turn
        self._seen: dict[str, tuple[int, int, float]] = {}  # job -> attempt, beat, when it was first seen so

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Work until asked to stop; then every job checkpoints and is queued again."""
        silent_since: float | None = None
        try:
            while not should_stop():
                try:
                    did_something = self.tick()
                    silent_since = None
                except StoreUnavailable as error:
                    # Jobs go on without their store; what they did is in their folders and told when it is back.
                    silent_since = silent_since or time.monotonic()
                    if time.monotonic() - silent_since > MAX_SILENCE:
                        raise
                    log.warning("the store does not answer, trying again: %s", error)
                    did_something = False
                if not did_something:
                    time.sleep(TICK_SECONDS)
        finally:
            self.stop()

    def tick(self) -> bool:
        """One round; True where something was started or ended."""
        for running in list(self._running.values()):
            self._look_after(running)
        self._advance()
        return self._claim()

    def _advance(self) -> None:
        """Queue jobs whose files are valid by now: the next hundred of those that wait, in turn, so that those whose files never
        come keep nobody waiting."""
        query = Query(None, {"status": "validating"}, self._advanced, limit=100, is_newest_first=False)
        page = self.platform.store.page(Job, query)
        for job in page.items:
            states.advance(self.platform, job)
        self._advanced = page.items[-1].id if page.has_more else None

    def stop(self) -> None:
        """Ask every process to checkpoint, wait for it, and queue its job again."""
        for running in self._running.values():
            _signal(running.process, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for running in list(self._running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.1, until - time.monotonic()))
            _signal(running.process, signal.SIGKILL)
            running.process.wait()
            try:
                while self._tell(running):
                    pass
                code = running.process.returncode
                self._settle(running, is_stopping=code in {0, Interrupted.exit_code} or code < 0)
            except (LeaseLost, StoreUnavailable) as error:
                log.warning("job %s is left to the next worker: %s", running.job.id, error)
            except Exception:  # the other jobs are still to be queued again; the next worker meets this one's trouble
                log.exception("job %s cannot be queued again", running.job.id)
        self._running.clear()
        if self._claimed is not None:
            back = {"status": "queued", "worker": "", "forgiven": self._claimed.attempt}
            with contextlib.suppress(LeaseLost, StoreUnavailable):
                self._end(self._claimed, back, "requeued", "the worker stopped before it started the job; it waits for another")

    @property
    def num_running(self) -> int:
        """Jobs that have a process here."""
        return len(self._running)

    def _claim(self) -> bool:
        free = self._slots - sum(running.job.slots for running in self._running.values())
        work = ["train", "evaluate"] if free > 0 else []
        if sum(running.job.work in SLOTLESS for running in self._running.values()) < MAX_SLOTLESS:
            work += SLOTLESS
        job = self._claimed
        if job is None and work:
            job = self.platform.store.claim(self.name, work=work, slots=max(0, free), lost=self._lost())
        if job is None:
            return False
        self._claimed = job
        try:
            self._start(job)
        except StoreUnavailable:
            raise  # the job is this worker's: it is started when the store answers again
        except LeaseLost:
            log.warning("job %s went to another worker before it was started", job.id)
        except Exception as error:  # what breaks one job may not end the worker, and so the jobs of everybody else
            if not isinstance(error, PreftuneError):
                log.exception("job %s cannot be started", job.id)
            message = str(error) if isinstance(error, PreftuneError) else f"its worker cannot start it: {_said(error)}"
            with contextlib.suppress(LeaseLost):
                self._fail(job, {"code": "cannot_start", "message": message})
        self._claimed = None
        return True

    def _lost(self) -> dict[str, int]:
        """Jobs whose beat has stood still for a lease, by this process's own monotonic clock."""
        query = Query(None, {"status": ("running", "exporting")}, limit=1000)
        clock = time.monotonic()
        seen: dict[str, tuple[int, int, float]] = {}
        for job in self.platform.store.page(Job, query).items:
            if job.id in self._running:
                continue
            before = self._seen.get(job.id)
            is_same = before is not None and before[:2] == (job.attempt, job.beat)
            seen[job.id] = (job.attempt, job.beat, before[2] if is_same and before is not None else clock)
        self._seen = seen
        return {job: beat for job, (_, beat, since) in seen.items() if clock - since > self._lease}

    def _start(self, job: Job) -> None:
        folder = self.platform.job_folder(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / child.TASK, self._task(job))
        environment = {**os.environ, **self._environment(job)}
        said = event(job.id, job.project, "started", f"attempt {job.attempt} began on {self.name}", attempt=job.attempt)
        # Told before there is a process: one that the store knows nothing of would keep its folder from the next attempt.
        job = self.platform.store.write_as_worker(job, {}, [said])
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 -- our own interpreter and module, and a folder that we named
                [sys.executable, "-m", "preftune.app.jobs.child", str(folder), str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment,
            )  # fmt: skip
        self._running[job.id] = Running(job, process, time.monotonic())

    def _environment(self, job: Job) -> dict[str, str]:
        """Users' keys that the process of a job is given, beside the worker's own environment."""
        return {**evaluations.environment_of(self.platform, job), **reporting.environment_of(self.platform, job)}

    def _task(self, job: Job) -> dict[str, Any]:
        cache = self.platform.context.cache
        if job.work == "validate":
            file = self.platform.store.get(File, job.files[0])
            if file is None:
                raise PreftuneError(f"file {job.files[0]!r} was deleted")
            path = self.platform.artifacts.local(file.artifact, cache / "artifacts")
            return {"work": "validate", "path": str(path), "filename": file.filename}
        if job.work == "export":
            return export_task(self.platform, job)
        if job.work == "evaluate":
            return evaluations.evaluation_task(self.platform, job)
        recipe = resolve(self.platform, job)
        place = {"cache": str(cache), "state": str(self.platform.context.state)}
        names = {recipe["model"]["name"]: job.recipe["model"]["name"]}  # what a message calls the folders that only it knows
        return {"work": job.work, "recipe": recipe, "names": names, "no_probe": job.no_probe, **place}

    def _look_after(self, running: Running) -> None:
        try:
            if running.process.poll() is not None:
                while self._tell(running):
                    pass
                self._settle(running)
                del self._running[running.job.id]  # not before: where the store is silent, it is told when it is back
                return
            clock = time.monotonic()
            if clock - running.beaten_at > self._lease / 6:
                running.job, running.beaten_at = self.platform.store.beat(running.job), clock
            self._tell(running)
            asked = self.platform.store.get(Job, running.job.id)
            if asked is not None and asked.asked and running.asked_at is None:
                running.asked_at = clock
                _signal(running.process, signal.SIGTERM)
            if running.asked_at is not None and clock - running.asked_at > STOP_SECONDS:
                _signal(running.process, signal.SIGKILL)
        except LeaseLost:
            self._drop(running)
        except StoreUnavailable:
            raise
        except Exception as error:  # what breaks one job may not end the worker, and so the jobs of everybody else
            log.exception("job %s cannot be looked after", running.job.id)
            self._drop(running)
            with contextlib.suppress(LeaseLost):
                message = f"its worker could not go on with it: {_said(error)}"
                self._fail(running.job, {"code": "internal_error", "message": message})

    def _drop(self, running: Running) -> None:
        """End the process of a job that is not this worker's any more."""
        _signal(running.process, signal.SIGKILL)
        running.process.wait()
        self._running.pop(running.job.id, None)

    def _tell(self, running: Running) -> bool:
        """Tell the store what is new in a job's run; True where something was."""
        if running.job.work != "train":
            return False
        told = follow(running.job, self.platform.job_folder(running.job.id) / child.RUN, running.places)
        if told.events:
            changes: dict[str, Any] = {"progress": told.progress}
            if any(one.type in {"checkpoint", "metrics"} for one in told.events):  # nothing is told twice
                changes["forgiven"] = running.job.attempt  # it got further than ever: earlier deaths count no more
            running.job = self.platform.store.write_as_worker(running.job, changes, told.events)
        running.places = told.places  # only now: what could not be written down is read again
        return bool(told.events)

    def _settle(self, running: Running, *, is_stopping: bool = False) -> None:
        """Write down how a process ended."""
        job, code = running.job, running.process.returncode
        folder = self.platform.job_folder(job.id)
        asked = self.platform.store.get(Job, job.id)
        wish = "" if asked is None else asked.asked
        if code == 0:
            self._succeed(job, folder)
        elif wish == "cancel":
            self._end(job, {"status": "cancelled", "asked": "", "finished_at": now()}, "cancelled", "the job was cancelled")
        elif wish == "pause":
            back = {"status": "paused", "asked": "", "worker": "", "forgiven": job.attempt}
            self._end(job, back, "paused", "the job was paused at its last checkpoint")
        elif is_stopping or code == Interrupted.exit_code:
            back = {"status": "queued", "worker": "", "forgiven": job.attempt}
            self._end(job, back, "requeued", "the worker stopped; the job waits for another")
        elif (folder / child.ERROR).is_file():
            self._fail(job, read_json(folder / child.ERROR))
        elif job.has_attempts_left:
            why = f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
            self._end(job, {"status": "queued", "worker": ""}, "requeued", f"{why}; it goes on from its last checkpoint")
        else:
            self._fail(
                job,
                {
                    "code": "process_died",
                    "message": f"its process died {job.attempt - job.forgiven} times without getting any further, "
                    f"the last time with {code}",
                },
            )

    def _succeed(self, job: Job, folder: Path) -> None:
        if job.work == "validate":
            files.apply_report(self.platform, job.files[0], read_json(folder / child.REPORT))
            self._end(job, {"status": "succeeded", "finished_at": now()}, "succeeded", "the file was validated")
            shutil.rmtree(folder, ignore_errors=True)
            return
        if job.work == "export":
            keep_archive(self.platform, job, folder / exports.ARCHIVE)
            self._end(job, {"status": "succeeded", "finished_at": now()}, "succeeded", "the model was packed")
            shutil.rmtree(folder, ignore_errors=True)
            return
        if job.work == "evaluate":
            report = read_json(folder / child.REPORT)
            result = evaluations.keep_result(self.platform, job, folder / grading.ROWS, report)
            self._end(job, {"status": "succeeded", "result": result, "finished_at": now()}, "succeeded", "the rows were judged")
            return
        job = self.platform.store.write_as_worker(job, {"status": "exporting"})
        models = register_models(self.platform, job, folder / child.RUN)
        record = run_record(folder / child.RUN)
        result = {"models": [model.id for model in models], "name": models[-1].name, "stages": named_stages(job, record)}
        self._end(
            job, {"status": "succeeded", "result": result, "finished_at": now()}, "succeeded", f"model {models[-1].name} is ready"
        )
        reporting.forget(self.platform, job)

    def _fail(self, job: Job, error: dict[str, Any]) -> None:
        if job.work == "validate":
            report = {"valid": False, "error": without_paths(str(error["message"])), "error_type": "INVALID_FORMAT"}
            files.apply_report(self.platform, job.files[0], report)
        message = without_paths(str(error["message"]))
        changes = {"status": "failed", "error": {"param": None, **error, "message": message}, "finished_at": now()}
        said = event(job.id, job.project, "failed", message, level="error")
        self.platform.store.write_as_worker(job, changes, [said])

    def _end(self, job: Job, changes: dict[str, Any], type_: str, message: str) -> None:
        self.platform.store.write_as_worker(job, changes, [event(job.id, job.project, type_, message)])


def _said(error: Exception) -> str:
    """An error in one line without paths of this machine."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return without_paths(" ".join(f"{type(error).__name__}: {error}".split()))


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the whole group of a job's process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
