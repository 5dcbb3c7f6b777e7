"""The judge behind a chat address: any server that speaks OpenAI's chat completions, a local one included.

    {name: llm, url: http://localhost:11434/v1, model: "qwen2.5:7b"}

or in short ``llm:qwen2.5:7b@http://localhost:11434/v1``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field

from preftune.core.errors import PreftuneError, UsageError
from preftune.core.ids import digest_json
from preftune.core.records import Messages
from preftune.judging.base import Candidate, NoVerdict, OnProgress, Request, Verdict, judges
from preftune.judging.llm_cache import ReplyCache
from preftune.judging.llm_client import Account, ChatClient, GivenUp, Limits, read_key
from preftune.judging.llm_prompt import CRITERIA, TEMPLATE, check_template, question, verdict_of_reply

ASKING = 1  # part of a judge's identity: raise it when the same options come to ask or read something else
TRIES_FOR_AN_ANSWER = 3  # a malformed answer is asked for again with another seed, this often in all
SEED_STEP = 1_000_003
TOP_LOGPROBS = 5
Finite = Field(allow_inf_nan=False)


@dataclass(slots=True)
class _Session:
    """What a judge holds while it works; no part of what it is."""

    account: Account = field(default_factory=Account)
    cache: ReplyCache = field(default_factory=lambda: ReplyCache(None))
    key: str | None = None
    is_prepared: bool = False
    refuses_logprobs: bool = False


@judges.register("llm")
@dataclass(frozen=True)
class LlmJudge:
    """An LLM that reads both completions and answers A, B or TIE.

    Parameters
        url: base address (``http://localhost:11434/v1``), or that of the chat completions themselves.
        model: the name that the server knows.
        api_key_env: the environment variable that holds the key; the key itself is never written anywhere.
        criteria: what better means, in a few sentences.
        template: Jinja template of the question, with ``criteria``, ``prompt``, ``first`` and ``second`` (already fenced).
        concurrency: calls at once; it changes no result.
        timeout_s: of one call. max_retries: after a timeout, a lost connection, 408, 425, 429 or 5xx.
        retry_budget_s: longest sum of the waits of one judgement; a longer Retry-After gives it up.
        temperature, seed, max_tokens: sent with every call; a model that thinks first needs more tokens.
        soft: ``auto`` takes log-probabilities of the verdict's token as the score where the server gives them, ``on`` insists on
            them, ``off`` asks for none.
        title: what the judge is called in reports.

    Raises
        UsageError: an address or a template that cannot be.
    """

    url: Annotated[str, MinLen(1)]
    model: Annotated[str, MinLen(1)]
    api_key_env: str | None = None
    criteria: Annotated[str, Field(max_length=20_000)] = ""
    template: str = ""
    concurrency: Annotated[int, Ge(1), Le(256)] = 8
    timeout_s: Annotated[float, Gt(0), Finite] = 60.0
    max_retries: Annotated[int, Ge(0), Le(100)] = 6
    retry_budget_s: Annotated[float, Ge(0), Finite] = 120.0
    temperature: Annotated[float, Ge(0), Finite] = 0.0
    seed: Annotated[int, Ge(0)] = 0
    max_tokens: Annotated[int, Ge(1)] = 16
    soft: Literal["auto", "on", "off"] = "auto"
    title: str = ""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            is_address = False
        if not is_address:
            raise UsageError(f"url {self.url!r} is no address; write one such as http://localhost:11434/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError(
                "url: no name, password or query may stand in it, it is printed; put the key into a variable, api_key_env"
            )
        if self.template:
            check_template(self.template)

    @cached_property
    def address(self) -> str:
        """Where requests go; a bare host gets ``/v1``."""
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/v1/chat/completions" if urlsplit(base).path == "" else f"{base}/chat/completions"

    @cached_property
    def identity(self) -> str:
        """Digest of what decides a verdict: address, model, question and sampling."""
        return digest_json({"name": "llm", "asking": ASKING, **self._settings()})

    @property
    def label(self) -> str:
        """The judge in a few words."""
        return f"LLM '{self.title or self.model}'"

    def describe(self) -> dict[str, Any]:
        """Name, title, label, identity and settings in JSON values; of the key only its variable."""
        told = {"name": "llm", "title": self.title, "label": self.label, "identity": self.identity}
        return {**told, "api_key_env": self.api_key_env, **self._settings()}

    def prepare(self, cache: Path | None) -> None:
        """Read the key and open the replies of earlier runs, in ``cache``."""
        session = self._session
        session.key = read_key(self.api_key_env)
        session.cache = ReplyCache(None if cache is None else cache / "judgements" / f"{self.identity}.jsonl")
        session.is_prepared = True

    def counts(self) -> dict[str, Any]:
        """Calls, cached replies, retries, failures, statuses and tokens so far."""
        return self._session.account.to_dict()

    def __call__(self, prompt: Messages, first: Candidate, second: Candidate) -> Verdict:
        """One judgement; NoVerdict where every answer was malformed or the retries were used up."""
        (verdict,) = self.judge_many([(prompt, first, second)])
        if verdict is None:
            raise NoVerdict(f"judge {self.label} gave no verdict: {self.counts()}")
        return verdict

    def judge_many(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Verdict | None]:
        """Verdicts in the order of the requests, up to ``concurrency`` at once; equal requests are asked once."""
        if not self._session.is_prepared:
            self.prepare(None)
        questions = [question(self.template, self.criteria, *request) for request in requests]
        limits = Limits(self.timeout_s, self.max_retries, self.retry_budget_s, self.concurrency)
        client = ChatClient(self.address, self._session.key, self.api_key_env, limits, self._session.account)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        verdicts: dict[str, Verdict | None] = {}
        try:
            waiting = {pool.submit(self._judge, client, text): text for text in dict.fromkeys(questions)}
            for done, future in enumerate(as_completed(waiting)):
                verdicts[waiting[future]] = future.result()
                if on_progress is not None:
                    on_progress(done + 1, len(waiting))
        finally:
            client.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            client.close()
        return [verdicts[text] for text in questions]

    def _judge(self, client: ChatClient, text: str) -> Verdict | None:
        account = self._session.account
        draw = random.Random(f"{self.seed} {digest_json(text)}")  # spreads waits, guards nothing
        for attempt in range(TRIES_FOR_AN_ANSWER):
            try:
                reply = self._reply(client, text, self.seed + attempt * SEED_STEP, draw)
            except GivenUp:
                break
            verdict = verdict_of_reply(reply, is_soft=self.soft != "off")
            if verdict is not None and self.soft == "on" and not verdict.detail["is_soft"]:
                raise PreftuneError(f"judge at {self.address} gives no log-probabilities; write soft: auto or soft: off")
            if verdict is not None:
                return verdict
            account.add("malformed")
        account.add("missing")
        return None

    def _reply(self, client: ChatClient, text: str, seed: int, draw: random.Random) -> dict[str, Any]:
        """The reply to one request, from the cache where it was paid for already."""
        session = self._session
        key = digest_json([text, seed])
        kept = session.cache.get(key)
        if kept is not None:
            session.account.add("cached")
            return kept
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": self.temperature,
            "seed": seed,
            "max_tokens": self.max_tokens,
        }
        asks_logprobs = self.soft == "on" or (self.soft == "auto" and not session.refuses_logprobs)
        if asks_logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            given = client.post(body, draw)
        except PreftuneError as error:
            if not (asks_logprobs and self.soft == "auto" and "logprob" in str(error)):
                raise
            session.refuses_logprobs = True
            given = client.post({name: value for name, value in body.items() if "logprobs" not in name}, draw)
        reply = _kept_part(given)
        for side in ("prompt", "completion"):
            count = reply["usage"].get(f"{side}_tokens")
            session.account.add(f"{side}_tokens", count if isinstance(count, int) and count > 0 else 0)
        session.cache.put(key, reply)
        return reply

    @cached_property
    def _session(self) -> _Session:
        return _Session()

    def _settings(self) -> dict[str, Any]:
        return {
            "url": self.address,
            "model": self.model,
            "criteria": self.criteria or CRITERIA,
            "template": self.template or TEMPLATE,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "soft": self.soft,
        }


def _kept_part(given: Any) -> dict[str, Any]:
    """The first choice and the token counts of a reply: what a verdict can come from."""
    reply = given if isinstance(given, Mapping) else {}
    choices = reply.get("choices")
    usage = reply.get("usage")
    return {
        "choices": choices[:1] if isinstance(choices, list) else [],
        "usage": dict(usage) if isinstance(usage, Mapping) else {},
    }
