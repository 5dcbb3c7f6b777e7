"""A judge on loopback that answers from hidden qualities, with a set taste for the first place and for length, and set faults."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from preftune.core.records import Message, Messages
from preftune.judging.base import Candidate
from preftune.judging.llm import LlmJudge

BLOCK = re.compile(r"<<<BEGIN (ANSWER [AB]) (\w+)>>>\n(.*?)\n<<<END \1 \2>>>", re.DOTALL)
Fault = str | None


def uniform(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts alone."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class JudgeServer:
    """Answers A where quality(A) - quality(B) + first + length * tanh((len A - len B) / scale) beats logistic noise."""

    def __init__(
        self,
        quality: Mapping[str, float],
        *,
        first: float = 0.0,
        length: float = 0.0,
        scale: float = 40.0,
        fault: Callable[[str, int], Fault] = lambda text, call: None,
        delay_s: float = 0.0,
        port: int = 0,
    ) -> None:
        self.quality, self.first, self.length, self.scale, self.fault, self.delay_s = (
            quality,
            first,
            length,
            scale,
            fault,
            delay_s,
        )
        self.calls: Counter[str] = Counter()  # calls by question
        self.paid: Counter[tuple[str, int]] = Counter()  # answered calls by question and seed
        self.outcomes: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chance_of_first(self, first: str, second: str) -> float:
        pull = self.length * math.tanh((len(first) - len(second)) / self.scale)
        return 1 / (1 + math.exp(-(self.quality[first] - self.quality[second] + self.first + pull)))

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][0]["content"]
        with self._lock:
            self.calls[text] += 1
            call = self.calls[text]
        time.sleep(self.delay_s)
        fault = self.fault(text, call)
        with self._lock:
            self.outcomes[fault or "answer"] += 1
        if fault == "timeout":
            time.sleep(0.9)
        if fault in {"429", "429-date"}:
            after = "0" if fault == "429" else formatdate(time.time() - 1, usegmt=True)
            return 429, {"Retry-After": after}, b'{"error": {"message": "slow down"}}'
        if fault == "500":
            return 500, {}, b"internal"
        (_, _, first), (_, _, second) = BLOCK.findall(text)
        chance = self.chance_of_first(first, second)
        said = "both are lovely" if fault == "malformed" else "A" if uniform(first, second) < chance else "B"
        with self._lock:
            self.paid[text, body["seed"]] += 1
        logprobs = None
        if body.get("logprobs"):
            top = [{"token": "A", "logprob": math.log(chance)}, {"token": "B", "logprob": math.log1p(-chance)}]
            logprobs = {"content": [{"token": said, "logprob": 0.0, "top_logprobs": top}]}
        choice = {"message": {"role": "assistant", "content": said}, "logprobs": logprobs, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 1}
        return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(dict(self.headers))
                status, headers, content = server.answer(body)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the caller gave up waiting

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@dataclass(frozen=True)
class Task:
    """prompts, the policy's and the baseline's texts, and the quality of each text."""

    prompts: list[Messages]
    policy: list[Candidate]
    baseline: list[Candidate]
    quality: dict[str, float]


def make_task(count: int, *, advantage: float = 0.6, extra: float = 15.0, seed: int = 0) -> Task:
    """The policy is better by ``advantage`` in log-odds and longer by ``extra`` characters, independently of each other."""
    draw = random.Random(seed)
    quality: dict[str, float] = {}
    sides: list[list[Candidate]] = [[], []]
    for number in range(count):
        for side, texts in enumerate(sides):
            text = f"{'pb'[side]}{number:04d} " + "x" * max(1, round(draw.gauss(80 + extra * (side == 0), 30)))
            quality[text] = draw.gauss(advantage * (side == 0), 0.7)
            texts.append(Candidate(text, len(text) // 4, True))
    return Task([(Message("user", f"question {number}"),) for number in range(count)], *sides, quality)


def llm_judge(url: str, **options: Any) -> LlmJudge:
    """A judge with waits short enough for a test."""
    return LlmJudge(**{"url": url, "model": "hidden", "soft": "off", "concurrency": 16, **options})
