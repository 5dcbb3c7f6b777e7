"""The client that waits: ``preftune.Client``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from preftune.core import api
from preftune.sdk import parts
from preftune.sdk.calls import Answer, Call, answer_of, chat
from preftune.sdk.errors import ConnectionFailed, error_of
from preftune.sdk.reading import delta_of, json_of, read
from preftune.sdk.retries import Retries
from preftune.sdk.settings import Place

T = TypeVar("T")
W = TypeVar("W", bound=api.Word)


class Client:
    """A client of one server, by one key.

    >>> with preftune.Client("http://127.0.0.1:8080") as client:                                  # doctest: +SKIP
    ...     file = client.files.upload("pairs.jsonl")
    ...     job = client.jobs.create(model="starter", files=file.id, method="dpo", beta=0.1)
    ...     job = client.jobs.wait(job.id)
    ...     print(client.chat(job.name, "Tell me a story.").text)

    Parameters
        server: its address; PREFTUNE_SERVER, else http://127.0.0.1:8080. api_key: PREFTUNE_API_KEY by default.
        timeout: seconds that an answer may take to begin. retries: when to send again. transport: of httpx2, for tests.

    Safe to use from several threads.

    Raises
        UsageError: no key, or an address that is none. Every call may raise an ``ApiError``.
    """

    def __init__(
        self, server: str | None = None, api_key: str | None = None, *, timeout: float = 120.0, retries: Retries | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        self.place = Place.of(server, api_key)
        self.retries = retries or Retries()
        self._seconds = timeout
        self._http = httpx2.Client(
            base_url=self.place.url,
            headers=self.place.headers,
            transport=transport,
        )
        self.files, self.jobs, self.models = parts.Files(self), parts.Jobs(self), parts.Models(self)
        self.aliases, self.webhooks = parts.Aliases(self), parts.Webhooks(self)
        self.evaluations, self.feedback = parts.Evaluations(self), parts.Feedback(self)
        self.splits, self.serving = parts.Splits(self), parts.Serving(self)
        self.keys, self.access = parts.Keys(self), parts.Access(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def chat(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """A model's answer. messages: a text, or a conversation. options: OpenAI's, such as max_tokens, temperature, seed."""
        body = chat(model, messages, options)
        return answer_of(self.send(Call("POST", "/v1/chat/completions", dict, body=body)))

    def chat_stream(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Iterator[str]:
        """The same in pieces of text, as they are written."""
        body = chat(model, messages, {**options, "stream": True})
        with self.stream(Call("POST", "/v1/chat/completions", dict, body=body)) as answer:
            for line in answer.iter_lines():
                if text := delta_of(line):
                    yield text

    def send(self, call: Call[T], content: Callable[[], Iterator[bytes]] | None = None) -> T:
        """Send a request, again where that helps; what it answers. content: makes the bytes of the body, anew for each try."""
        with self.stream(call, content) as answer:
            return read(answer.read(), call.reads, str(answer.url))

    def every(self, call: Call[api.Page[W]]) -> Iterator[W]:
        """Every thing of a list, page by page."""
        while True:
            page = self.send(call)
            yield from page.data
            if page.next is None:
                return
            call = Call(call.method, call.path, call.reads, {**call.params, "after": page.next})

    @contextmanager
    def stream(self, call: Call[Any], content: Callable[[], Iterator[bytes]] | None = None) -> Iterator[httpx2.Response]:
        """An answer whose body is still to be read."""
        answer = self._tried(call, content)
        try:
            yield answer
        finally:
            answer.close()

    def _tried(self, call: Call[Any], content: Callable[[], Iterator[bytes]] | None) -> httpx2.Response:
        tried = 0
        while True:
            tried += 1
            body = {"content": content()} if content is not None else {"json": call.body} if call.body is not None else {}
            timeout = httpx2.Timeout(self._seconds, connect=10.0, read=call.read_seconds or self._seconds)
            request = self._http.build_request(
                call.method, call.path, params=call.params or None, headers=call.headers, timeout=timeout, **body
            )
            try:
                answer = self._http.send(request, stream=True)
            except httpx2.TransportError as error:
                is_unsent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                wait = self.retries.wait(tried) if call.is_repeatable or is_unsent else None
                if wait is None:
                    raise ConnectionFailed(f"{self.place.url}: {error or type(error).__name__}; is the server running?") from None
                time.sleep(wait)
                continue
            if answer.is_success:
                return answer
            try:
                told = answer.read()
            finally:
                answer.close()
            wait = self.retries.wait_after(tried, answer.status_code, answer.headers, is_repeatable=call.is_repeatable)
            if wait is None:
                raise error_of(answer.status_code, json_of(told), answer.headers, str(answer.url))
            time.sleep(wait)


def chunks_of(path: Path, size: int, progress: Callable[[int, int], None] | None, chunk: int) -> Iterator[bytes]:
    """A file's bytes, telling how many of them are gone."""
    sent = 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            yield block
            sent += len(block)
            if progress is not None:
                progress(sent, size)
