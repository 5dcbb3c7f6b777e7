"""Sinks beside a run: each on a thread of its own, with a queue; what one raises or how long it takes is its own affair."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from preftune.core.events import Event, EventSink, Noted, Progress
from preftune.core.leaving import leave_behind
from preftune.tracking.base import RunFacts, Sink, Status, without_secrets

QUEUE = 10_000
"""Events that a slow sink may be behind; beyond it the newest are dropped, and that is said."""
CLOSE_SECONDS = 30.0


@dataclass(slots=True)
class _Lane:
    """One sink, its queue and its thread."""

    name: str
    sink: Sink
    events: queue.Queue[Event | Status] = field(default_factory=lambda: queue.Queue(QUEUE))
    thread: threading.Thread | None = None
    failure: str = ""
    is_told: bool = False
    num_dropped: int = 0


class Tracking:
    """Events to every sink. A failure is said once, as a warning, through ``tell``; the run goes on.

    Parameters
        sinks: by name. run: what they are told first. tell: takes the warnings, on the caller's thread.
        close_seconds: how long they may take to end, together.
    """

    def __init__(
        self, sinks: Mapping[str, Sink], run: RunFacts, tell: EventSink, *, close_seconds: float = CLOSE_SECONDS
    ) -> None:
        self._tell, self._close_seconds = tell, close_seconds
        self._lanes = [_Lane(name, sink) for name, sink in sinks.items()]
        for lane in self._lanes:
            # a daemon: one that hangs does not keep the process alive
            lane.thread = threading.Thread(target=_work, args=(lane, run), name=f"sink-{lane.name}", daemon=True)
            lane.thread.start()

    def __call__(self, event: Event, /) -> None:
        """Hand an event to every sink that still works; returns at once."""
        if isinstance(event, Progress):
            return
        for lane in self._lanes:
            if lane.failure:
                self._say(lane)
                continue
            try:
                lane.events.put_nowait(event)
            except queue.Full:
                lane.num_dropped += 1

    def close(self, status: Status) -> None:
        """Let every sink end, for a bounded time; what failed or did not end is said."""
        for lane in self._lanes:
            if not lane.failure:
                try:
                    lane.events.put_nowait(status)
                except queue.Full:
                    lane.failure = f"is {QUEUE} events behind and was left where it is"
        deadline = time.monotonic() + self._close_seconds
        for lane in self._lanes:
            assert lane.thread is not None
            lane.thread.join(max(0.0, deadline - time.monotonic()))
            if lane.thread.is_alive() and not lane.failure:
                lane.failure = f"did not end within {self._close_seconds:.0f} s and was left; its last events may be missing"
            if lane.failure:
                self._abandon(lane)
            self._say(lane)

    def _abandon(self, lane: _Lane) -> None:
        """Let a sink that failed or hangs drop what would keep this process from ending, and wait for none of it at the end."""
        abandon: Callable[[], None] | None = getattr(lane.sink, "abandon", None)
        if abandon is not None:
            with contextlib.suppress(Exception):
                abandon()
        if abandon is not None or (lane.thread is not None and lane.thread.is_alive()):
            leave_behind(f"sink {lane.name}")

    def _say(self, lane: _Lane) -> None:
        if lane.num_dropped and not lane.failure:
            lane.failure = f"was too slow: {lane.num_dropped} events were dropped"
        if not lane.failure or lane.is_told:
            return
        lane.is_told = True
        where = "the run goes on, and its folder has everything"
        self._tell(Noted("warning", "sink_failed", f"tracking: {lane.name} {lane.failure}; {where}"))


def _work(lane: _Lane, run: RunFacts) -> None:
    """The whole life of a sink."""
    try:
        lane.sink.begin(run)
        while True:
            event = lane.events.get()
            if isinstance(event, str):
                lane.sink.end(event)
                return
            lane.sink.take(event)
    except BaseException as error:  # noqa: BLE001 - whatever a tool raises, SystemExit included, must not reach the run
        words = " ".join(str(error).split()) or "no message"
        lane.failure = without_secrets(f"failed and is left out from here on: {type(error).__name__}: {words[:300]}")


def missing_of(sinks: Mapping[str, Sink]) -> Sequence[tuple[str, str, str]]:
    """Name, what is missing, and the way out, of every sink that cannot work here."""
    return [(name, sink.missing(), sink.way_out()) for name, sink in sinks.items() if sink.missing()]
