"""The embedded engine's process: one base model, its adapters and a batcher; JSON lines in and out.

In: ``{"do": "answer", "ask": ...}``, ``{"do": "cancel", "id": ...}``, ``{"do": "unload", "adapter": ...}`` and
``{"do": "state", "id": ...}``. Out: events with the request's id. The process ends when its input does, so it never
outlives its server. Prompts are rendered and adapters read by the thread that listens; the main thread only computes.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from preftune.core.errors import PreftuneError
from preftune.core.loading import own_process
from preftune.core.recipe import ModelConfig
from preftune.modeling.adapter_bank import BASE, read_factors
from preftune.modeling.decoder import decoder_of
from preftune.modeling.lineage import Factors
from preftune.modeling.load import load_model, load_tokenizer
from preftune.modeling.tokenizer import HubTokenizer
from preftune.serving.answer import Prompt
from preftune.serving.batcher import Batcher, Limits, read_prompt
from preftune.serving.protocol import Ask, EngineError, EngineEvent, to_row

Read = tuple[Prompt, str, Factors | None]


class Worker:
    """The process's state.

    Parameters
        config: ``model`` (name or folder), ``dtype``, ``limits`` and ``adapter_bytes``, the memory that adapters may take.
        out: where lines go.
    """

    def __init__(self, config: dict[str, Any], out: TextIO) -> None:
        loaded = load_model(ModelConfig(name=config["model"]), precision=_precision(config["dtype"]))
        self._decoder = decoder_of(loaded.model)
        self._tokenizer = loaded.tokenizer
        self._tokenizers: dict[str, HubTokenizer] = {}
        self._positions = min(loaded.max_positions, config["limits"]["positions"])
        self._adapter_bytes = int(config["adapter_bytes"])
        self._resident: dict[str, int] = {}
        self._batcher = Batcher(self._decoder, Limits(**config["limits"]), self._emit)
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._out, self._lines = out, [""] * 0
        self._lock = threading.Lock()
        self._say({
            "event": "ready", "positions": self._positions, "reason": self._decoder.reason,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        })  # fmt: skip
        self._flush()

    def listen(self, lines: TextIO) -> None:
        """Take requests until the input ends."""
        for line in lines:
            row = json.loads(line)
            if row["do"] == "answer":
                self._prepare(Ask.from_dict(row["ask"]))
            else:
                self._inbox.put((row["do"], row))
        self._inbox.put(("end", None))

    def run(self) -> None:
        """Compute until the input ends."""
        while True:
            is_idle = self._batcher.is_idle
            while True:
                try:
                    what, given = self._inbox.get() if is_idle else self._inbox.get_nowait()
                except queue.Empty:
                    break
                if what == "end":
                    return
                self._do(what, given)
                is_idle = False
            self._batcher.step()
            self._flush()

    def _prepare(self, ask: Ask) -> None:
        """In the listening thread: everything of a request that does not need the model."""
        try:
            key = _version(ask.adapter)
            tokenizer = self._tokenizer_of(ask.adapter, key)
            prompt = read_prompt(tokenizer, ask, self._positions)
            factors = read_factors(ask.adapter) if key and key not in self._resident else None
        except EngineError as error:
            self._inbox.put(("fail", (ask.id, error)))
        except PreftuneError as error:
            self._inbox.put(("fail", (ask.id, EngineError("failed", str(error)))))
        else:
            self._inbox.put(("submit", (prompt, key, factors)))

    def _tokenizer_of(self, adapter: str, key: str) -> HubTokenizer:
        """An adapter's own tokenizer, because a chat template may have been chosen for its training."""
        if not adapter:
            return self._tokenizer
        if key not in self._tokenizers:
            found = load_tokenizer(ModelConfig(name=adapter))
            self._tokenizers[key] = self._tokenizer if found.identity == self._tokenizer.identity else found
        return self._tokenizers[key]

    def _do(self, what: str, given: Any) -> None:
        if what == "submit":
            self._submit(given)
        elif what == "fail":
            self._emit(*given)
        elif what == "cancel":
            self._batcher.cancel(given["id"])
        elif what == "unload":
            self._unload(given["adapter"])
        elif what == "state":
            sizes = {key.rpartition("@")[0]: self._decoder.bank.sizes[number] for key, number in self._resident.items()}
            self._say({"event": "state", "id": given["id"], "adapters": sizes, **self._batcher.counts})
        self._flush()

    def _submit(self, read: Read) -> None:
        prompt, key, factors = read
        try:
            number = BASE if not key else self._adapter(key, prompt.ask.adapter, factors)
            self._batcher.submit(prompt, number)
        except EngineError as error:
            self._emit(prompt.ask.id, error)
        except PreftuneError as error:
            self._emit(prompt.ask.id, EngineError("failed", f"{prompt.ask.adapter}: {error}"))

    def _adapter(self, key: str, folder: str, factors: Factors | None) -> int:
        """The number of an adapter, which takes the place of those that nobody used for longest."""
        if key not in self._resident:
            self._resident[key] = self._decoder.bank.add(read_factors(folder) if factors is None else factors)
        number = self._resident[key]
        self._make_room(keep=number)
        return number

    def _make_room(self, keep: int) -> None:
        sizes = self._decoder.bank.sizes
        busy = self._batcher.adapters_in_use() | {keep}
        for number in list(sizes):
            if sum(sizes.values()) <= self._adapter_bytes:
                return
            if number not in busy:
                self._remove(number)
        if sum(sizes.values()) > self._adapter_bytes and len(sizes) > 1:
            self._remove(keep)
            raise EngineError(
                "overloaded", "the adapters in use take all memory that adapters may have; try again", code="adapters_busy",
                retry_after=2.0,
            )  # fmt: skip

    def _unload(self, folder: str) -> None:
        for key, number in list(self._resident.items()):
            if key.rpartition("@")[0] == folder and number not in self._batcher.adapters_in_use():
                self._remove(number)

    def _remove(self, number: int) -> None:
        key = next(key for key, kept in self._resident.items() if kept == number)
        del self._resident[key]
        self._tokenizers.pop(key, None)
        self._decoder.bank.remove(number)

    def _emit(self, request: str, event: EngineEvent | EngineError) -> None:
        self._say({"id": request, **to_row(event)})

    def _say(self, row: dict[str, Any]) -> None:
        self._lines.append(json.dumps(row))

    def _flush(self) -> None:
        """All that a step had to say in one write."""
        if self._lines:
            lines, self._lines = self._lines, []
            self._out.write("\n".join(lines) + "\n")
            self._out.flush()


def _version(adapter: str) -> str:
    """An adapter's folder and the age of its files, so that a folder that was written again is read again."""
    if not adapter:
        return ""
    try:
        return f"{adapter}@{max(path.stat().st_mtime_ns for path in Path(adapter).glob('adapter_*'))}"
    except (OSError, ValueError):
        raise EngineError("failed", f"{adapter}: the adapter's folder is gone") from None


def _precision(dtype: str) -> Any:
    from preftune.modeling.load import DTYPES

    if dtype in DTYPES:
        return dtype
    import torch

    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def main() -> int:
    """The process. Its first line of input is the configuration."""
    own_process()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to stdout is no answer
    lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
    config = json.loads(lines.readline())
    try:
        worker = Worker(config, out)
    except PreftuneError as error:
        out.write(json.dumps({"event": "refused", "message": str(error)}) + "\n")
        out.flush()
        return 1
    threading.Thread(target=worker.listen, args=(lines,), daemon=True).start()
    try:
        worker.run()
    except BrokenPipeError:
        return 0  # the server is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
