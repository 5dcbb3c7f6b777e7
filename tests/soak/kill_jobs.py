"""Kill -9 of the server, of the worker and of training processes, phase by phase; then nothing may be lost.

    python tests/soak/kill_jobs.py [KILLS] [FOLDER]

A real installation on SQLite: ``preftune serve``, ``preftune worker``, jobs over HTTP as OpenAI's client sends them. Each
kill waits until its phase is seen, strikes after a random moment, is logged with that phase, and the victim is started again. At
the end every file and job that a client was told of is there, every job has succeeded, each step was trained and told once, each
model is registered once, and the weights of all jobs are the same bits as those of a job that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import closing, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

KEY = "soak-key-0123456789abcdef"
STEPS = 8
STAGE = {"adapter": "full", "lr": 1e-4, "epochs": 4, "max_steps": STEPS, "checkpoints": 4, "pairs_per_step": 4, "evals": 0}
PAIRS = Path(str(files("preftune"))) / "starter" / "pairs.jsonl"
PLAN = (
    ("process", "training"), ("server", "uploading"), ("worker", "validating"), ("process", "starting"),
    ("worker", "exporting"), ("server", "creating"), ("process", "checkpointing"), ("worker", "training"),
    ("process", "validating"), ("server", "training"), ("worker", "checkpointing"), ("worker", "starting"),
)  # fmt: skip
PATIENCE = 600.0


class Installation:
    """A server and a worker in a folder, and what a client was told by them."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, 0
        self.environment = {
            **os.environ, "PREFTUNE_HOME": str(home), "PREFTUNE_API_KEY": KEY, "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.content = b"".join(PAIRS.read_bytes().splitlines(keepends=True)[:24])
        self.files: list[str] = []
        self.jobs: list[str] = []
        self.alive: dict[str, subprocess.Popen[bytes]] = {}
        self.database: sqlite3.Connection | None = None
        self.start("server")
        self.start("worker")

    def start(self, name: str) -> None:
        """Start the server (at the port of before) or the worker."""
        log = (self.home / f"{name}.log").open("ab")
        words = ["serve", "--slots", "0", "--port", str(self.port)] if name == "server" else ["worker", "--lease", "3"]
        command = [sys.executable, "-m", "preftune", *words]
        self.alive[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        log.close()  # the process has its own
        if name == "server":
            end = time.monotonic() + PATIENCE
            while not self._answers():
                assert self.alive[name].poll() is None, (self.home / "server.log").read_text()[-2000:]
                assert time.monotonic() < end, "the server did not come up"
                time.sleep(0.05)

    def _answers(self) -> bool:
        if not self.port:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", (self.home / "server.log").read_text())
            self.port = int(found.group(1)) if found else 0
        with suppress(OSError, http.client.HTTPException, AssertionError):
            return bool(self.call("GET", "/v1/models")["data"])
        return False

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> dict[str, Any]:
        """One request; AssertionError where the answer is no success."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port or 1, timeout=60)) as connection:
            connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", **headers})
            answer = connection.getresponse()
            text = answer.read()
        assert answer.status == 200, f"{method} {path}: {answer.status} {text[:300]!r}"
        found: dict[str, Any] = json.loads(text)
        return found

    def persist(self, *request: Any, **headers: str) -> dict[str, Any]:
        """A request as a client sends it: again, until there is an answer."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.call(*request, **headers)
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < end, f"{request[:2]}: no answer"
                time.sleep(0.05)

    def upload(self, pieces: int = 1) -> str:
        """Upload the pairs; in several pieces with pauses where somebody wants to see it happen."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}\r\n'
            'Content-Disposition: form-data; name="file"; filename="pairs.jsonl"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        body = head + self.content + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        if pieces == 1:
            made = self.persist("POST", "/v1/files", body, **kind)["id"]
            self.files.append(made)
            return str(made)
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.putrequest("POST", "/v1/files")
            for name, value in {"Authorization": f"Bearer {KEY}", **kind, "Content-Length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders()
            size = -(-len(body) // pieces)
            for at in range(pieces):
                connection.send(body[at * size : (at + 1) * size])
                time.sleep(0.05)
            made = json.loads(connection.getresponse().read())["id"]
        self.files.append(made)
        return str(made)

    def create(self) -> str:
        """A job on a file of its own; the key lets the client ask again without making two."""
        body = {"model": "starter", "training_file": self.upload(), "method": {"type": "dpo", "dpo": {}}, "preftune": STAGE}
        body["seed"] = 7
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        made = self.persist("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode(), **headers)["id"]
        self.jobs.append(made)
        return str(made)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Records of the database, read beside its owners."""
        if self.database is None:
            self.database = sqlite3.connect(
                f"file:{self.home / 'preftune.db'}?mode=ro", uri=True, timeout=30, check_same_thread=False
            )
        return [json.loads(body) for (body,) in self.database.execute(f"SELECT body FROM {kind} ORDER BY number")]

    def process_of(self, job: str) -> psutil.Process | None:
        """The process that works on a job."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "preftune.app.jobs.child" in words and any(word.endswith(f"/{job}") for word in words):
                return process
        return None

    def seen(self, phase: str) -> str | None:
        """A job that is in that phase just now."""
        running = [job for job in self.rows("jobs") if job["status"] in {"running", "exporting"}]
        for job in running:
            stages = sorted((self.home / "jobs" / job["id"] / "run" / "stages").glob("*"))
            steps = [stage for stage in stages if (stage / "metrics.jsonl").is_file()]
            if job["work"] == "validate":
                now = "validating"
            elif job["status"] == "exporting":
                now = "exporting"
            elif any(True for stage in stages for _ in stage.glob("checkpoints/.writing-*")):
                now = "checkpointing"
            else:
                now = "training" if steps else "starting"
            if now == phase and (now == "exporting" or self.process_of(job["id"]) is not None):
                return str(job["id"])
        return None

    def stop(self) -> None:
        """End both processes as an operator would."""
        if self.database is not None:
            self.database.close()
        for process in self.alive.values():
            process.terminate()
        for process in self.alive.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(150)
            process.kill()
            process.wait()


def strike(one: Installation, victim: str, phase: str, draw: random.Random) -> None:
    """Wait for the phase, kill the victim, start it again."""
    helper: threading.Thread | None = None
    if phase in {"uploading", "creating"}:
        do = (lambda: one.upload(pieces=12)) if phase == "uploading" else one.create

        def quietly() -> None:
            with suppress(OSError, http.client.HTTPException, ValueError):
                do()

        helper = threading.Thread(target=quietly)
        helper.start()
        time.sleep(draw.uniform(0.02, 0.4))
        job = None
    else:
        job = wait_for(one, phase)
        if phase in {"training", "starting"}:
            time.sleep(draw.uniform(0, 0.3))
    if victim == "process":
        assert job is not None
        process = one.process_of(job)
        if process is not None:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    else:
        one.alive[victim].kill()
        one.alive[victim].wait()
        one.start(victim)
    if helper is not None:
        helper.join()


def wait_for(one: Installation, phase: str) -> str:
    """A job in that phase; jobs are made where none is on its way there."""
    end = time.monotonic() + PATIENCE
    made_at = 0.0
    while True:
        job = one.seen(phase)
        if job is not None:
            return job
        assert time.monotonic() < end, f"phase {phase} was not seen; jobs: {Counter(job['status'] for job in one.rows('jobs'))}"
        waiting = [job for job in one.rows("jobs") if job["status"] in {"validating", "queued", "running"}]
        if not any(job["work"] == "train" for job in waiting) or (phase == "validating" and time.monotonic() - made_at > 5):
            one.create()
            made_at = time.monotonic()
        time.sleep(0.002 if phase in {"exporting", "checkpointing"} else 0.02)


def soak(home: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill so often; what was seen. AssertionError as soon as something was lost."""
    home.mkdir(parents=True, exist_ok=True)
    draw, one, log = random.Random(seed), Installation(home), []
    try:
        first = one.create()
        await_end(one, [first])
        for number in range(kills):
            victim, phase = PLAN[number % len(PLAN)]
            began = time.monotonic()
            strike(one, victim, phase, draw)
            log.append((victim, phase))
            print(
                f"kill {number + 1:3}: {victim:8} while {phase:13} ({time.monotonic() - began:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
        await_end(one, one.jobs)
        return check(one, first) | {"kills": len(log), "phases": dict(Counter(f"{victim}/{phase}" for victim, phase in log))}
    finally:
        one.stop()


def await_end(one: Installation, jobs: list[str]) -> None:
    """Wait until these jobs have ended."""
    end = time.monotonic() + PATIENCE + 30 * len(jobs)
    while True:
        states = {job["id"]: job["status"] for job in one.rows("jobs") if job["id"] in jobs}
        if all(state in {"succeeded", "failed", "cancelled"} for state in states.values()):
            return
        assert time.monotonic() < end, states
        time.sleep(0.1)


def check(one: Installation, first: str) -> dict[str, Any]:
    """Everything that a client was told is true, and happened once."""
    jobs = {job["id"]: job for job in one.rows("jobs") if job["work"] == "train"}
    assert set(one.jobs) <= set(jobs), "a job that a client was told of is gone"
    assert len(jobs) == len(one.jobs), "a job was made twice, or one that nobody was told of"
    failed = {job["id"]: job["error"] for job in jobs.values() if job["status"] != "succeeded"}
    assert not failed, failed
    known = {file["id"]: file for file in one.rows("files")}
    assert set(one.files) <= set(known), "a file that a client was told of is gone"
    digest = hashlib.sha256(one.content).hexdigest()
    for file in known.values():  # a file that nobody was told of was whole before its server died
        assert file["sha256"] == digest == hashlib.sha256((one.home / "artifacts" / file["artifact"]).read_bytes()).hexdigest()
        assert file["status"] == "processed", file
    events, models = one.rows("events"), one.rows("models")
    weights = {}
    for job in jobs:
        own = [event for event in events if event["subject"] == job and event["type"] == "metrics"]
        told = [event["step"] for event in own if "loss" in event["data"]["metrics"]]  # the probe has rows of its own
        assert told == list(range(1, STEPS + 1)), f"{job}: steps told {told}"
        assert sum(event["type"] == "succeeded" for event in events if event["subject"] == job) == 1
        run = one.home / "jobs" / job / "run" / "stages" / "1-dpo"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == list(range(1, STEPS + 1)), f"{job}: steps in its metrics {steps}"
        names = [model["name"] for model in models if model["job"] == job]
        assert len(names) == len(set(names)) >= 2, names
        weights[job] = hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()
    assert set(weights.values()) == {weights[first]}, "a disturbed job's weights differ from an undisturbed one's"
    attempts = [job["attempt"] for job in jobs.values()]
    return {"jobs": len(jobs), "files": len(known), "most_attempts": max(attempts), "seconds": None}


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    home = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp(prefix="preftune-soak-"))
    home.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = soak(home, kills)
    print(json.dumps(found | {"seconds": round(time.monotonic() - began)}, indent=1))
    if len(sys.argv) <= 2:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
