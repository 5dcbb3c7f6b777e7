"""Ten thousand files and jobs, two hundred clients at once: what a server answers, how fast, and what it holds.

    python tests/soak/load_server.py [SECONDS] [CLIENTS] [RECORDS]

A real ``preftune serve`` on SQLite, filled through its store. First, while nobody else asks (``idle``), pages of a hundred are
read from all over the lists of every dialect, and the unpaged ones whole. Then the clients upload, look at their files, create
jobs, poll and cancel, all at once; any answer but a success or 429 is an error. One more client reads the same pages meanwhile
(``under_load``): on a machine whose cores all this shares, that is the time of a page behind everybody else's requests. The
bound holds for the idle server. The server's memory is read all along.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import insert

from preftune.app.context import Context
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.app.recipes import check_recipe
from preftune.store.records import File, Job, new_id
from preftune.store.sql import _row
from preftune.store.tables import tables

KEY = "soak-key-0123456789abcdef"
ROW = json.dumps({"prompt": "Say hello.", "chosen": "Hello, friend!", "rejected": "No."}) + "\n"
STAGE = {"adapter": "lora", "max_steps": 1, "pairs_per_step": 4}
PAGE_SECONDS = 0.05


def fill(home: Path, number: int) -> None:
    """So many files and jobs, as a long life would leave them."""
    platform = Platform.open(Context(home / "cache", home))
    project = platform.project(DEFAULT_PROJECT).id
    stage = {"method": "dpo", "loss": {"beta": 0.1}, "adapter": "lora", "data": {"train": ["file-x"], "select": 0.0}}
    recipe = check_recipe({"model": {"name": "starter"}, "stages": [stage]}).model_dump(mode="json")
    recipe["stages"][0] |= {"from_checkpoint": ""}
    files = [
        File(
            id=new_id("file-"), project=project, filename=f"{at}.jsonl", purpose="fine-tune", bytes=1000, sha256="0" * 64,
            status="processed", artifact=f"files/{at}.jsonl", report={"valid": True}, num_rows=10,
        )
        for at in range(number)
    ]  # fmt: skip
    jobs = [
        Job(
            id=new_id("ft-"), project=project, work="train", status="succeeded", model="starter", files=(one.id,), name=f"m{at}",
            recipe=recipe,
        )
        for at, one in enumerate(files)
    ]  # fmt: skip
    engine = platform.store._engine  # type: ignore[attr-defined]  # 20,000 transactions of one row would take minutes
    with engine.begin() as connection:
        connection.execute(insert(tables["files"]), [_row(one) for one in files])
        connection.execute(insert(tables["jobs"]), [_row(one) for one in jobs])
    platform.store.close()


class Client:
    """One connection that is kept, and a count of what came back."""

    def __init__(self, port: int, counts: Counter[str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._counts = counts

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[dict[str, Any], float]:
        """The answer and how long it took."""
        began = time.perf_counter()
        try:
            self._connection.request(method, path, body, {"Authorization": f"Bearer {KEY}", "Content-Type": kind})
            answer = self._connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            self._counts[f"no answer: {type(error).__name__}"] += 1
            return {}, time.perf_counter() - began
        if answer.status in {400, 409} and path.endswith("/cancel") and b"wrong_state" in text:
            self._counts["ended before it was cancelled"] += 1
            return {}, time.perf_counter() - began
        name = (
            "ok"
            if answer.status == 200
            else "429"
            if answer.status == 429
            else f"{answer.status} {method} {path.partition('?')[0]}"
        )
        self._counts[name if name in {"ok", "429"} else f"error: {name}: {text[:200]!r}"] += 1
        return (json.loads(text) if answer.status == 200 else {}), time.perf_counter() - began

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()

    def upload(self, rows: int) -> str:
        """Upload a small file; its id, empty where it was turned away."""
        body = (
            '--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
            'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + ROW * rows + "\r\n--b--\r\n"
        )
        found, _ = self.ask("POST", "/v1/files", body.encode(), "multipart/form-data; boundary=b")
        return str(found.get("id", ""))


def live(port: int, counts: Counter[str], until: float, seed: int) -> None:
    """What one client does until the end: upload, create, poll, cancel, look around."""
    draw, client = random.Random(seed), Client(port, counts)
    while time.monotonic() < until:
        file = client.upload(draw.randint(1, 200))
        if file:
            body = {"model": "starter", "training_file": file, "method": {"type": "dpo", "dpo": {}}, "preftune": STAGE}
            job = client.ask("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode())[0].get("id")
            for _ in range(draw.randint(2, 8)):
                time.sleep(draw.uniform(0.5, 3.0))
                client.ask("GET", f"/v1/files/{file}")
                if job:
                    client.ask("GET", f"/v1/fine_tuning/jobs/{job}")
                    client.ask("GET", f"/v1/fine_tuning/jobs/{job}/events?limit=100")
            client.ask("GET", "/v1/fine_tuning/jobs?limit=20")
            if job:
                client.ask("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    client.close()


PAGES = {
    "files": "/v1/files?limit=100", "jobs": "/v1/fine_tuning/jobs?limit=100", "native_files": "/api/v1/files?limit=100",
    "native_jobs": "/api/v1/jobs?limit=100", "seekr_files": "/v1/flow/files?limit=100",
}  # fmt: skip
WHOLE = {"files": "/v1/files", "together_jobs": "/v1/fine-tunes", "seekr_jobs": "/v1/flow/fine-tunes"}


def quantiles(times: list[float]) -> dict[str, float]:
    """Median and 95 % quantile of some seconds."""
    return {"p50_s": round(statistics.median(times), 4), "p95_s": round(sorted(times)[max(0, int(0.95 * len(times)) - 1)], 4)}


def pages(port: int, count: int, until: float = math.inf) -> dict[str, dict[str, float]]:
    """Seconds of pages of a hundred from all over each list, ``count`` of each, or as many as come before a time."""
    client, times, after = Client(port, Counter()), {name: [0.0] * 0 for name in PAGES}, dict.fromkeys(PAGES, "")
    for _ in range(count):
        for name, path in PAGES.items():
            if time.monotonic() > until:
                break
            page, seconds = client.ask("GET", path + after[name])
            assert page["data"], (name, page)
            if len(page["data"]) == 100:  # while clients upload, a list's last page is what is left over
                times[name].append(seconds)
            last = page.get("last_id") or page.get("next")
            after[name] = f"&after={last}" if last and page["has_more"] else ""  # SeekrFlow's has no cursor: its first page
    client.close()
    return {name: quantiles(found) for name, found in times.items() if found}


def whole_lists(port: int, number: int) -> dict[str, float]:
    """Seconds of each list that is not paged."""
    client, found = Client(port, Counter()), {}
    for name, path in WHOLE.items():
        whole, seconds = client.ask("GET", path)
        assert len(whole["data"]) >= min(number, 10_000), name
        found[name] = round(seconds, 2)
    client.close()
    return found


def soak(home: Path, seconds: float, clients: int, records: int) -> dict[str, Any]:
    """Fill, read pages, then everybody at once; what was seen."""
    home.mkdir(parents=True, exist_ok=True)
    fill(home, records)
    environment = {**os.environ, "PREFTUNE_HOME": str(home), "PREFTUNE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    log = home / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "preftune", "serve", "--port", "0"], env=environment, stdout=sink, stderr=sink
        )
    try:
        end = time.monotonic() + 120
        while not (at := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        port, counts, server = int(at.group(1)), Counter[str](), psutil.Process(process.pid)
        found: dict[str, Any] = {"idle": pages(port, min(100, records // 100)), "whole_list_s": whole_lists(port, records)}
        memory, until = [], time.monotonic() + seconds

        def read_on() -> None:
            found["under_load"] = pages(port, 100, until)

        threads = [threading.Thread(target=live, args=(port, counts, until, seed)) for seed in range(clients)]
        threads.append(threading.Thread(target=read_on))
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            time.sleep(min(1.0, seconds / 20))
            memory.append(server.memory_info().rss / 1e6)
        for thread in threads:
            thread.join()
    finally:
        process.terminate()
        process.wait(150)
    third = max(1, len(memory) // 3)
    return found | {
        "clients": clients,
        "seconds": seconds,
        "answers": {name: count for name, count in counts.items() if not name.startswith(("error", "no answer"))},
        "errors": {name: count for name, count in counts.items() if name.startswith(("error", "no answer"))},
        "memory_mb": {
            "second third": round(statistics.median(memory[third : 2 * third + 1]), 1),
            "last third": round(statistics.median(memory[2 * third :]), 1),
        },
    }


def main() -> None:
    given = [float(word) for word in sys.argv[1:4]]
    seconds, clients, records = [*given, *(300.0, 200.0, 10_000.0)[len(given) :]]
    home = Path(tempfile.mkdtemp(prefix="preftune-load-"))
    try:
        found = soak(home, seconds, int(clients), int(records))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(found, indent=1))
    grown = found["memory_mb"]["last third"] / found["memory_mb"]["second third"]
    slowest = max(one["p95_s"] for one in found["idle"].values())
    good = not found["errors"] and slowest < PAGE_SECONDS and grown < 1.1
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
