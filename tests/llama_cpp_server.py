"""llama.cpp's own server on a GGUF file, for tests that hold ours against it; skips where its environment is absent."""

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
RUNNER = ROOT / "bench" / "environments" / "llama_server.py"


class LlamaCpp:
    """Where it listens."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that it answers."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
            return json.loads(answer.read())

    def log_probs(self, ids: Sequence[int], size: int) -> dict[int, float]:
        """log p of every token of the vocabulary behind these, before anything that sampling does to it."""
        # what is drawn is set to an exclamation mark: an end token, or a part of a character, would leave no probabilities
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": size, "cache_prompt": False, "logit_bias": [["!", 1e4]]}
        (place,) = self.ask("/completion", body)["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in place["top_logprobs"]}


@contextmanager
def llama_cpp(model: Path, *options: str) -> Iterator[LlamaCpp]:
    """A server for the block."""
    if not PYTHON.exists():
        pytest.skip("llama.cpp is not there (bench/environments/make.sh llama)")
    log = model.with_suffix(".log")
    with log.open("wb") as said:
        process = subprocess.Popen([PYTHON, RUNNER, model, *options], stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"^listening on (http://\S+)$", log.read_text(errors="replace"), re.MULTILINE)):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        yield LlamaCpp(found.group(1))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
