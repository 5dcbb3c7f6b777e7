"""The client that is awaited: ``preftune.AsyncClient``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from preftune.core import api
from preftune.sdk import async_parts as parts
from preftune.sdk.calls import Answer, Call, answer_of, chat
from preftune.sdk.errors import ConnectionFailed, error_of
from preftune.sdk.reading import delta_of, json_of, read
from preftune.sdk.retries import Retries
from preftune.sdk.settings import Place

T = TypeVar("T")
W = TypeVar("W", bound=api.Word)


class AsyncClient:
    """``Client`` with every call awaited; lists and streams are asynchronous iterators. Of one event loop.

    >>> async with preftune.AsyncClient("http://127.0.0.1:8080") as client:                       # doctest: +SKIP
    ...     async for event in client.jobs.events("ft-..."):
    ...         print(event.message)
    """

    def __init__(
        self, server: str | None = None, api_key: str | None = None, *, timeout: float = 120.0, retries: Retries | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        self.place = Place.of(server, api_key)
        self.retries = retries or Retries()
        self._seconds = timeout
        self._http = httpx2.AsyncClient(
            base_url=self.place.url,
            headers=self.place.headers,
            transport=transport,
        )
        self.files, self.jobs, self.models = parts.Files(self), parts.Jobs(self), parts.Models(self)
        self.aliases, self.webhooks = parts.Aliases(self), parts.Webhooks(self)
        self.evaluations, self.feedback = parts.Evaluations(self), parts.Feedback(self)
        self.splits, self.serving = parts.Splits(self), parts.Serving(self)
        self.keys, self.access = parts.Keys(self), parts.Access(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """A model's answer. messages: a text, or a conversation. options: OpenAI's, such as max_tokens, temperature, seed."""
        body = chat(model, messages, options)
        return answer_of(await self.send(Call("POST", "/v1/chat/completions", dict, body=body)))

    async def chat_stream(self, model: str, messages: str | Sequence[Mapping[str, Any]], **options: Any) -> AsyncIterator[str]:
        """The same in pieces of text, as they are written."""
        body = chat(model, messages, {**options, "stream": True})
        async with self.stream(Call("POST", "/v1/chat/completions", dict, body=body)) as answer:
            async for line in answer.aiter_lines():
                if text := delta_of(line):
                    yield text

    async def send(self, call: Call[T], content: Callable[[], AsyncIterator[bytes]] | None = None) -> T:
        """Send a request, again where that helps; what it answers. content: makes the bytes of the body, anew for each try."""
        async with self.stream(call, content) as answer:
            return read(await answer.aread(), call.reads, str(answer.url))

    async def every(self, call: Call[api.Page[W]]) -> AsyncIterator[W]:
        """Every thing of a list, page by page."""
        while True:
            page = await self.send(call)
            for one in page.data:
                yield one
            if page.next is None:
                return
            call = Call(call.method, call.path, call.reads, {**call.params, "after": page.next})

    @asynccontextmanager
    async def stream(
        self, call: Call[Any], content: Callable[[], AsyncIterator[bytes]] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """An answer whose body is still to be read."""
        answer = await self._tried(call, content)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _tried(self, call: Call[Any], content: Callable[[], AsyncIterator[bytes]] | None) -> httpx2.Response:
        tried = 0
        while True:
            tried += 1
            body = {"content": content()} if content is not None else {"json": call.body} if call.body is not None else {}
            timeout = httpx2.Timeout(self._seconds, connect=10.0, read=call.read_seconds or self._seconds)
            request = self._http.build_request(
                call.method, call.path, params=call.params or None, headers=call.headers, timeout=timeout, **body
            )
            try:
                answer = await self._http.send(request, stream=True)
            except httpx2.TransportError as error:
                is_unsent = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout))
                wait = self.retries.wait(tried) if call.is_repeatable or is_unsent else None
                if wait is None:
                    raise ConnectionFailed(f"{self.place.url}: {error or type(error).__name__}; is the server running?") from None
                await asyncio.sleep(wait)
                continue
            if answer.is_success:
                return answer
            try:
                told = await answer.aread()
            finally:
                await answer.aclose()
            wait = self.retries.wait_after(tried, answer.status_code, answer.headers, is_repeatable=call.is_repeatable)
            if wait is None:
                raise error_of(answer.status_code, json_of(told), answer.headers, str(answer.url))
            await asyncio.sleep(wait)


async def chunks_of(path: Path, size: int, progress: Callable[[int, int], None] | None, chunk: int) -> AsyncIterator[bytes]:
    """A file's bytes, telling how many of them are gone."""
    sent = 0
    with path.open("rb") as file:
        while block := file.read(chunk):
            yield block
            sent += len(block)
            if progress is not None:
                progress(sent, size)
