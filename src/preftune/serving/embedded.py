"""The embedded engine as its server sees it: a process for one base, started at the first request.

The process has the model and torch; the server never imports them, answers while it loads and computes, and survives
its death: requests that ran end with an error that says so, and the next one starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from preftune.serving.protocol import Ask, EngineError, EngineEvent, Usage, from_row

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
LONGEST_LINE = 1 << 28
STOP_SECONDS = 10


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a base is served.

    dtype: ``auto`` is bfloat16 on a GPU that has it, else float32. rows: answers that grow at once. waiting: requests in the
    queue. reading: prompt tokens a step. kept_bytes: memory for keys and values. adapter_bytes: memory for adapters.
    positions: tokens that a conversation may have, where that is less than the model's own limit.
    """

    dtype: Dtype = "auto"
    rows: int = 32
    waiting: int = 256
    reading: int = 512
    kept_bytes: int = 2 << 30
    adapter_bytes: int = 1 << 30
    positions: int = 1 << 30

    def to_config(self, model: str) -> dict[str, Any]:
        """The first line that the process reads."""
        limits = asdict(self)
        dtype, adapters = limits.pop("dtype"), limits.pop("adapter_bytes")
        return {"model": model, "dtype": dtype, "limits": limits, "adapter_bytes": adapters}


class EmbeddedEngine:
    """A base model in a process of its own.

    Parameters
        model: the starter's name, a folder or a hub id.

    Attributes
        used: when it was last asked, by the monotonic clock. num_asked: requests that run or wait.
        facts: what the process said of itself when it was ready.
    """

    def __init__(self, model: str, options: EngineOptions) -> None:
        self.model, self.options = model, options
        self.used = time.monotonic()
        self.facts: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._ready: asyncio.Future[dict[str, Any]] | None = None
        self._queues: dict[str, asyncio.Queue[EngineEvent | EngineError | dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self.num_asked = 0

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def answer(self, ask: Ask) -> AsyncGenerator[EngineEvent, None]:
        """The events of a request; closing the iterator cancels it.

        Raises
            EngineError: the request is refused, the queue is full, the model cannot be loaded, the process died.
        """
        if self.num_asked >= self.options.rows + self.options.waiting:
            raise EngineError(
                "overloaded", f"{self.num_asked} requests run or wait already; try again", code="queue_full", retry_after=2.0
            )
        number = f"{next(self._numbers)}"
        events: asyncio.Queue[EngineEvent | EngineError | dict[str, Any]] = asyncio.Queue()
        self.used = time.monotonic()
        self.num_asked += 1
        is_done = True
        try:
            await self._start()
            self._queues[number] = events
            is_done = False
            self._write({"do": "answer", "ask": replace(ask, id=number).to_dict()})
            while not is_done:
                event = await events.get()
                if isinstance(event, EngineError):
                    is_done = True
                    raise event
                is_done = isinstance(event, Usage)
                if not isinstance(event, dict):
                    yield event
        finally:
            self._queues.pop(number, None)
            self.num_asked -= 1
            self.used = time.monotonic()
            if not is_done:
                self._write({"do": "cancel", "id": number})

    async def state(self) -> dict[str, Any]:
        """What the process does: answers that grow, prompts that are read, requests that wait, adapters in memory."""
        if self.pid is None:
            return {"growing": 0, "reading": 0, "waiting": 0, "adapters": {}}
        number = f"state-{next(self._numbers)}"
        events: asyncio.Queue[EngineEvent | EngineError | dict[str, Any]] = asyncio.Queue()
        self._queues[number] = events
        try:
            self._write({"do": "state", "id": number})
            found = await events.get()
        finally:
            self._queues.pop(number, None)
        if isinstance(found, EngineError):
            raise found
        assert isinstance(found, dict)
        return found

    async def load(self) -> None:
        """Start the process and wait until the model is loaded."""
        await self._start()

    def unload(self, adapter: str) -> None:
        """Take an adapter out of memory where nobody uses it."""
        self._write({"do": "unload", "adapter": adapter})

    async def close(self) -> None:
        """End the process; requests that run end with an error."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    def _write(self, row: dict[str, Any]) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            with contextlib.suppress(ConnectionError):
                process.stdin.write(json.dumps(row).encode() + b"\n")

    async def _start(self) -> None:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                if self._reader is not None:
                    await asyncio.gather(self._reader, return_exceptions=True)  # it tells those who asked the one that died
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "preftune.serving.child", limit=LONGEST_LINE,
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
                self._ready = asyncio.get_running_loop().create_future()
                self._write(self.options.to_config(self.model))
                self._reader = asyncio.create_task(self._read(self._process, self._ready))
            ready = self._ready
        assert ready is not None
        self.facts = await asyncio.shield(ready)

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Future[dict[str, Any]]) -> None:
        """Give every line to the request that it belongs to, until the process ends."""
        assert process.stdout is not None
        refusal = ""
        async for line in process.stdout:
            row = json.loads(line)
            if row["event"] == "ready":
                ready.set_result(row)
            elif row["event"] == "refused":
                refusal = row["message"]
            else:
                queue = self._queues.get(row.pop("id"))
                if queue is not None:
                    queue.put_nowait(row if row["event"] == "state" else from_row(row))
        code = await process.wait()
        if refusal:
            error = EngineError("failed", refusal, code="model_not_loadable")
        else:
            why = f"it was killed by signal {-code}, perhaps for its memory" if code < 0 else f"it ended with status {code}"
            error = EngineError(
                "unavailable", f"the process that serves this model is gone ({why}); the next request starts it again",
                code="engine_died", retry_after=1.0,
            )  # fmt: skip
        if not ready.done():
            ready.set_exception(error)
            ready.exception()  # it is raised where somebody waits; nobody may
        for queue in self._queues.values():
            queue.put_nowait(error)
