"""The upstream engine: the same names and the same events from any OpenAI-compatible server (vLLM, llama.cpp, Ollama ...).

A base is asked under the name that the server has for it. An adapter is loaded into vLLM through ``/v1/load_lora_adapter``
(it must see the same folders, and run with VLLM_ALLOW_RUNTIME_LORA_UPDATING); a server without such a route must offer the
tuned model under its own name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from preftune.core.errors import UsageError
from preftune.serving.protocol import Ask, EngineError, EngineEvent, Finished, Piece, TokenLogprob, Usage

if TYPE_CHECKING:
    import httpx2

Adapters: TypeAlias = Literal["vllm", "names"]
CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """Where a base is served.

    url: up to ``/v1``. model: its name there. adapters: ``vllm`` loads them by ``/v1/load_lora_adapter``, ``names`` asks for a
    tuned model by its own name. key: the API key, None for none.
    """

    url: str
    model: str
    adapters: Adapters = "names"
    key: str | None = None


def parse_upstream(text: str, environment: Mapping[str, str]) -> tuple[str, UpstreamOptions]:
    """``NAME=URL``, with ``#model=...&adapters=vllm&key=VARIABLE`` behind it; the name and the rest.

    Raises
        UsageError: something else; a variable that is not set.

    >>> parse_upstream("my-sft=http://gpu:8000/v1#adapters=vllm", {})[1].adapters
    'vllm'
    """
    name, _, rest = text.partition("=")
    url, _, more = rest.partition("#")
    parts = urlsplit(url)
    if not name or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError(f"--upstream {text}: write NAME=URL, such as my-sft=http://gpu:8000/v1#adapters=vllm")
    options = dict(parse_qsl(more))
    unknown = sorted(options.keys() - {"model", "adapters", "key"})
    adapters = options.get("adapters", "names")
    if unknown or adapters not in {"vllm", "names"}:
        raise UsageError(f"--upstream {text}: behind # may stand model=NAME, adapters=vllm or names, and key=VARIABLE")
    key = None
    if "key" in options:
        key = environment.get(options["key"])
        if not key:
            raise UsageError(f"--upstream {text}: the environment variable {options['key']} is not set; put the API key there")
    return name, UpstreamOptions(url.rstrip("/"), options.get("model", name), "vllm" if adapters == "vllm" else "names", key)


class UpstreamEngine:
    """A base and its adapters on a server elsewhere."""

    def __init__(self, options: UpstreamOptions) -> None:
        self.options = options
        self._client: httpx2.AsyncClient | None = None
        self._loaded: dict[str, str] = {}

    async def answer(self, ask: Ask) -> AsyncGenerator[EngineEvent, None]:
        """The events of a request; closing the iterator hangs up.

        Raises
            EngineError: the server refuses, is not there, or breaks off.
        """
        model = await self._model(ask)
        try:
            async for event in self._events(ask, model):
                yield event
        except EngineError as error:
            if error.kind != "not_found" or ask.adapter not in self._loaded:
                raise
        else:
            return
        del self._loaded[ask.adapter]  # the server was started again and has forgotten it
        model = await self._model(ask)
        async for event in self._events(ask, model):
            yield event

    async def unload(self, adapter: str) -> None:
        """Take an adapter out of the server's memory."""
        name = self._loaded.pop(adapter, None)
        if name is not None:
            await self._post("/unload_lora_adapter", {"lora_name": name})

    async def state(self) -> dict[str, Any]:
        """Where it is, and which adapters were loaded there."""
        return {"upstream": self.options.url, "adapters": dict.fromkeys(self._loaded, None)}

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._client.aclose()

    async def _model(self, ask: Ask) -> str:
        """The name that the server has for what is asked; an adapter is loaded at its first request."""
        if not ask.adapter:
            return self.options.model
        if self.options.adapters == "names":
            return ask.model
        if ask.adapter not in self._loaded:
            name = f"preftune-{hashlib.sha256(ask.adapter.encode()).hexdigest()[:16]}"
            status, text = await self._post("/load_lora_adapter", {"lora_name": name, "lora_path": ask.adapter})
            if status >= 400 and "already" not in text:
                raise EngineError(
                    "unavailable", f"the upstream server does not load the adapter of {ask.model} ({status}: {_said(text)}); "
                    "vLLM needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and the same folders", code="adapter_not_loadable",
                )  # fmt: skip
            self._loaded[ask.adapter] = name
        return self._loaded[ask.adapter]

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        import httpx2

        try:
            answer = await self._http().post(self.options.url + path, json=body)
        except httpx2.HTTPError as error:
            raise self._gone(error) from None
        return answer.status_code, answer.text

    def _http(self) -> httpx2.AsyncClient:
        import httpx2

        if self._client is None:
            headers = {"Authorization": f"Bearer {self.options.key}"} if self.options.key else {}
            timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
            limits = httpx2.Limits(max_connections=None)
            self._client = httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=False)
        return self._client

    async def _events(self, ask: Ask, model: str) -> AsyncGenerator[EngineEvent, None]:
        import httpx2

        is_chat = ask.messages is not None
        path = "/chat/completions" if is_chat else "/completions"
        try:
            async with self._http().stream("POST", self.options.url + path, json=body_of(ask, model)) as answer:
                if answer.status_code != 200:
                    raise refusal(answer.status_code, (await answer.aread()).decode(errors="replace"), answer.headers)
                if ask.is_streamed:
                    async for row in _rows(answer):
                        for event in chunk_events(row, is_chat=is_chat):
                            yield as_asked(event, ask)
                else:
                    row = json.loads(await answer.aread())
                    check_echo(ask, row)
                    for event in whole_events(row, is_chat=is_chat):
                        yield as_asked(event, ask)
        except httpx2.HTTPError as error:
            raise self._gone(error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                "unavailable", f"the upstream server's answer cannot be read ({type(error).__name__}: {error})"
            ) from None

    def _gone(self, error: Exception) -> EngineError:
        host = urlsplit(self.options.url).netloc
        why = str(error) or type(error).__name__
        return EngineError(
            "unavailable", f"the upstream server at {host} does not answer ({why}); try again",
            code="upstream_unavailable", retry_after=2.0,
        )  # fmt: skip


async def _rows(answer: httpx2.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of each server-sent event, until ``[DONE]``."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        yield json.loads(data)
    raise EngineError("unavailable", "the upstream server broke off in the middle of its answer", code="upstream_unavailable")


def body_of(ask: Ask, model: str) -> dict[str, Any]:
    """A request in OpenAI's words; what only some servers know is sent only where it was asked for."""
    s = ask.sampling
    body: dict[str, Any] = {"model": model, "temperature": s.temperature, "top_p": s.top_p, "n": ask.n, "stream": ask.is_streamed}
    if ask.messages is not None:
        body["messages"] = ask.messages
        if ask.tools:
            body["tools"] = ask.tools
        if ask.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": max(1, ask.logprobs)}  # llama.cpp takes 0 for none at all
    else:
        body["prompt"] = ask.ids if ask.text is None else ask.text
        if ask.logprobs is not None:
            body["logprobs"] = max(1, ask.logprobs)
    if ask.is_streamed:
        body["stream_options"] = {"include_usage": True}
    wanted: dict[str, tuple[Any, Any]] = {
        "max_tokens": (s.max_tokens, None), "seed": (s.seed, None), "stop": (list(s.stop), []),
        "presence_penalty": (s.presence_penalty, 0.0), "frequency_penalty": (s.frequency_penalty, 0.0),
        "logit_bias": ({str(token): bias for token, bias in s.logit_bias.items()}, {}), "echo": (ask.echo, False),
        "top_k": (s.top_k, 0), "min_p": (s.min_p, 0.0), "repetition_penalty": (s.repetition_penalty, 1.0),
        "min_tokens": (s.min_tokens, 0), "stop_token_ids": (list(s.stop_ids), []), "ignore_eos": (s.ignore_eos, False),
    }  # fmt: skip
    return body | {name: value for name, (value, usual) in wanted.items() if value != usual}


def refusal(status: int, text: str, headers: Mapping[str, str]) -> EngineError:
    """What an upstream status means for whoever asked."""
    said = _said(text)
    try:
        inner = json.loads(text).get("error") or {}
    except (ValueError, AttributeError):
        inner = {}
    code = inner.get("code") if isinstance(inner, dict) and isinstance(inner.get("code"), str) else None
    param = inner.get("param") if isinstance(inner, dict) and isinstance(inner.get("param"), str) else None
    if status in {401, 403}:
        return EngineError("unavailable", f"the upstream server does not take this server's key ({status})", code="upstream_key")
    if status == 404:
        return EngineError("not_found", f"the upstream server has no such model: {said}", code="model_not_found", param="model")
    if status == 429:
        try:
            wait = float(headers.get("retry-after", "1"))
        except ValueError:
            wait = 1.0
        return EngineError("overloaded", f"the upstream server is busy: {said}", code=code or "queue_full", retry_after=wait)
    if 400 <= status < 500:
        return EngineError("bad_request", said, code=code, param=param)
    return EngineError("unavailable", f"the upstream server failed ({status}): {said}", code="upstream_failed", retry_after=2.0)


def _said(text: str) -> str:
    """The message of an error body, in one line."""
    try:
        row = json.loads(text)
        inner = row.get("error", row)
        found = inner if isinstance(inner, str) else inner.get("message") or row.get("detail") or text
    except (ValueError, AttributeError):
        found = text
    return " ".join(str(found).split())[:500]


def chunk_events(row: dict[str, Any], *, is_chat: bool) -> list[EngineEvent]:
    """The events of one chunk of a stream.

    Raises
        EngineError: the chunk is an error.
    """
    if "error" in row:
        raise EngineError("failed", f"the upstream server failed on the way: {_said(json.dumps(row))}", code="upstream_failed")
    events: list[EngineEvent] = []
    for choice in row.get("choices") or []:
        text = (choice.get("delta") or {}).get("content") if is_chat else choice.get("text")
        logprobs = _logprobs(choice.get("logprobs"), is_chat=is_chat)
        if text or logprobs:
            events.append(Piece(choice["index"], text or "", logprobs))
        if choice.get("finish_reason"):
            events.append(Finished(choice["index"], _reason(choice["finish_reason"])))
    if row.get("usage"):
        events.append(_usage(row["usage"]))
    return events


def as_asked(event: EngineEvent, ask: Ask) -> EngineEvent:
    """The event without the best token of each place, where none was asked for beside the one that stands there."""
    if ask.logprobs == 0 and not isinstance(event, Usage):
        return replace(event, logprobs=[replace(one, top=[]) for one in event.logprobs])
    return event


def check_echo(ask: Ask, row: dict[str, Any]) -> None:
    """EngineError where the prompt was to be repeated and is not: llama.cpp leaves ``echo`` unread."""
    if ask.echo and ask.text and not all(choice["text"].startswith(ask.text) for choice in row["choices"]):
        raise EngineError("bad_request", "the upstream server does not repeat prompts; ask without echo", param="echo")


def whole_events(row: dict[str, Any], *, is_chat: bool) -> list[EngineEvent]:
    """The events of an answer that is not streamed."""
    events: list[EngineEvent] = []
    for choice in row["choices"]:
        text = choice["message"].get("content") if is_chat else choice["text"]
        logprobs = _logprobs(choice.get("logprobs"), is_chat=is_chat)
        events.append(Finished(choice["index"], _reason(choice.get("finish_reason")), text or "", logprobs))
    return [*events, _usage(row.get("usage") or {})]


def _usage(row: dict[str, Any]) -> Usage:
    return Usage(int(row.get("prompt_tokens") or 0), int(row.get("completion_tokens") or 0))


def _reason(given: Any) -> Literal["stop", "length"]:
    return "length" if given == "length" else "stop"


def _logprobs(given: Any, *, is_chat: bool) -> list[TokenLogprob]:
    if not given:
        return []
    if is_chat or "content" in given:  # llama.cpp tells those of completions as it does those of turns
        return [
            TokenLogprob(
                one["token"], one["logprob"], one.get("bytes") or list(one["token"].encode()), 0,
                [(top["token"], top["logprob"], top.get("bytes") or [], 0) for top in one.get("top_logprobs") or []],
            )
            for one in given.get("content") or []
        ]  # fmt: skip
    tops = given.get("top_logprobs") or [{}] * len(given["tokens"])
    return [
        TokenLogprob(
            token, logp, list(token.encode()), 0, [(text, value, list(text.encode()), 0) for text, value in (top or {}).items()]
        )
        for token, logp, top in zip(given["tokens"], given["token_logprobs"], tops, strict=True)
    ]  # fmt: skip
