"""``preftune serve`` and ``preftune worker``: the API and a worker over one installation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType

from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import Platform
from preftune.app.jobs.webhooks import Deliverer
from preftune.app.jobs.worker import LEASE_SECONDS, Worker
from preftune.core.errors import UsageError
from preftune.serving.upstream import UpstreamOptions

STARTER = "starter"
ELSEWHERE = "upstream:"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # before a dead worker is started again: longer each time that it dies at once
STEADY_SECONDS = 60.0  # of a worker's life, after which its death is a first one again


def offer_models(platform: Platform, given: Mapping[str, str], elsewhere: Collection[str] = ()) -> list[str]:
    """Offer the starter and the operator's models by name, and those that only another server has; the names.

    Raises
        UsageError: a folder that is not there.
    """
    for name, folder in {STARTER: STARTER, **given}.items():
        if folder != STARTER and not Path(folder).expanduser().is_dir():
            raise UsageError(f"model {name}={folder}: no such folder; name one that holds a model")
        add_base_model(platform, name, folder if folder == STARTER else str(Path(folder).expanduser().resolve()))
    for name in elsewhere:
        if name != STARTER and name not in given:
            add_base_model(platform, name, ELSEWHERE + name)
    return [STARTER, *(name for name in given if name != STARTER)]


def placed_upstreams(given: Mapping[str, str], upstreams: Mapping[str, UpstreamOptions]) -> dict[str, UpstreamOptions]:
    """The servers elsewhere by the base that each has, as models are placed."""
    folders = {STARTER: STARTER, **{name: str(Path(folder).expanduser().resolve()) for name, folder in given.items()}}
    return {folders.get(name, ELSEWHERE + name): options for name, options in upstreams.items()}


def work(platform: Platform, *, slots: int, lease: float = LEASE_SECONDS) -> None:
    """Work on jobs until SIGTERM or SIGINT; running jobs checkpoint and wait for the next worker."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    teller = threading.Thread(target=Deliverer(platform).run, args=(stop.is_set,), name="webhooks", daemon=True)
    teller.start()
    server = os.environ.get("PREFTUNE_EMBEDDED", "")  # its process, told by it: it may have died while this one was starting
    Worker(platform, slots=slots, lease=lease).run(lambda: stop.is_set() or (server != "" and os.getppid() != int(server)))


class EmbeddedWorker:
    """A worker as a process of its own beside a server; started again where it dies, ended with its server.

    Parameters
        slots: jobs that it runs at once. say: told when it had to be started again.
    """

    def __init__(self, slots: int, say: Callable[[str], None]) -> None:
        self._slots, self._say = slots, say
        self._ended, self._turn = threading.Event(), threading.Lock()
        self._process = self._start()
        self._watch = threading.Thread(target=self._keep, name="embedded worker", daemon=True)
        self._watch.start()

    def stop(self, seconds: float) -> None:
        """Let its jobs checkpoint, for so long at most, and end it."""
        with self._turn:
            self._ended.set()
            self._process.send_signal(signal.SIGTERM)  # nothing happens where it is gone
        self._watch.join(seconds)
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "preftune", "worker", "--slots", str(self._slots)]
        return subprocess.Popen(command, env={**os.environ, "PREFTUNE_EMBEDDED": str(os.getpid())}, start_new_session=True)  # noqa: S603 -- our own command

    def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code = self._process.wait()
            if self._ended.is_set():
                return
            pause = FIRST_PAUSE if time.monotonic() - began > STEADY_SECONDS else min(2 * pause, LONGEST_PAUSE)
            self._say(f"the embedded worker ended with code {code}; it is started again, its jobs go on from their checkpoints")
            self._ended.wait(pause)
            with self._turn:
                if self._ended.is_set():
                    return
                self._process = self._start()
