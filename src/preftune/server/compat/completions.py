"""Chat and completions, one handler for every dialect: OpenAI's, Together's and SeekrFlow's paths."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from preftune.app.serving.capture import keep
from preftune.app.serving.service import Service
from preftune.app.serving.splits import Chosen, choose_model
from preftune.core.errors import UsageError
from preftune.server.compat import shaping
from preftune.server.compat.asking import ChatRequest, CompletionRequest, chat_ask, completion_asks
from preftune.server.errors import ApiError, envelope
from preftune.server.security import Caller, CallerOf
from preftune.serving.protocol import Ask, EngineError, EngineEvent, Finished, Piece, Usage

router = APIRouter()
STATUS = {"bad_request": 400, "not_found": 404, "overloaded": 429, "unavailable": 503, "failed": 500}
Item = tuple[int, EngineEvent]  # the number of the prompt that an event belongs to


class ClientGone(Exception):
    """Whoever asked has hung up."""


@router.post("/v1/chat/completions")
@router.post("/v1/inference/chat/completions")
async def chat(request: Request, caller: CallerOf, body: ChatRequest) -> Response:
    """Answer a conversation."""
    chosen = await _model(request, caller, body.model, body.user)
    head = _head("chatcmpl-")
    keeper = Keeper(request.app.state.serving, caller.project, chosen, head[0])
    ask = chat_ask(body)
    keeper.consent(ask.messages or [], is_asked=body.store)
    shape = shaping.Chat(head, body.model, body.is_counted, body.per_token)
    return await _respond(request, keeper, [ask], shape, is_streamed=bool(body.stream))


@router.post("/v1/completions")
@router.post("/v1/inference/completions")
async def complete(request: Request, caller: CallerOf, body: CompletionRequest) -> Response:
    """Go on with a text."""
    chosen = await _model(request, caller, body.model, body.user)
    head = _head("cmpl-")
    is_together = request.headers.get("user-agent", "").lower().startswith(("together/", "asynctogether/"))
    shape = shaping.Text(head, body.model, body.is_counted, body.n or 1, is_together)
    keeper = Keeper(request.app.state.serving, caller.project, chosen, head[0])
    return await _respond(request, keeper, completion_asks(body), shape, is_streamed=bool(body.stream))


def _head(prefix: str) -> tuple[str, int]:
    return f"{prefix}{secrets.token_hex(12)}", int(time.time())


async def _model(request: Request, caller: Caller, name: str, user: str | None) -> Chosen:
    caller.must_be("developer")
    try:
        return await run_in_threadpool(choose_model, request.app.state.platform, caller.project, name, user)
    except UsageError as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None


class Keeper:
    """Keeps an answer where there is consent, and of a split's answers at least who gave them."""

    def __init__(self, service: Service, project: str, chosen: Chosen, request: str) -> None:
        self.service, self.chosen = service, chosen
        self._project, self._request = project, request
        self._messages: list[dict[str, Any]] = []
        self._texts: dict[int, str] = {}

    def consent(self, messages: list[dict[str, Any]], *, is_asked: bool | None) -> None:
        """Whether the conversation may be kept.

        Raises
            ApiError: it was asked for on a server that keeps none.
        """
        how = self.service.options.capture
        if is_asked and how == "off":
            raise ApiError(
                400, "store: this server keeps no completions; its operator can start it with --capture asked", param="store",
                code="capture_off",
            )  # fmt: skip
        if (is_asked and how == "asked") or (how == "all" and is_asked is not False):
            self._messages = messages

    async def watch(self, events: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
        """Pass events on, and keep what they add up to before the last one is told."""
        is_kept = bool(self._messages or self.chosen.split)
        async with aclosing(events):
            async for number, event in events:
                if is_kept and isinstance(event, Piece | Finished):
                    self._texts[event.choice] = self._texts.get(event.choice, "") + event.text
                if is_kept and isinstance(event, Usage):
                    await run_in_threadpool(
                        keep, self.service.platform, self.chosen.model, self._project, self._request, self._messages, self._texts,
                        split=(self.chosen.split, self.chosen.unit),
                    )  # fmt: skip
                    is_kept = False
                yield number, event


async def _respond(request: Request, keeper: Keeper, asks: list[Ask], shape: shaping.Shape, *, is_streamed: bool) -> Response:
    service, model = keeper.service, keeper.chosen.model
    events = _until_gone(request, keeper.watch(_merged([service.answer(model, ask) for ask in asks])))
    try:
        if is_streamed:
            first = await anext(events)  # a refusal has its own status, so it must come before the stream begins
            return StreamingResponse(
                _lines(shape, first, events), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        async with aclosing(events):
            async for number, event in events:
                shape.take(number, event)
    except EngineError as error:
        raise api_error(error) from None
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(shape.whole())


def api_error(error: EngineError) -> ApiError:
    """An engine's refusal as an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": f"{error.retry_after:.1f}"}
    return ApiError(STATUS[error.kind], str(error), param=error.param, code=error.code, headers=headers)


async def _lines(shape: shaping.Shape, first: Item, events: AsyncGenerator[Item, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: chunks, and ``[DONE]``; a failure on the way is one chunk with the error."""
    async with aclosing(events):
        try:
            for row in shape.chunks(*first):
                yield shaping.line(row)
            async for number, event in events:
                for row in shape.chunks(number, event):
                    yield shaping.line(row)
            for row in shape.last():
                yield shaping.line(row)
        except EngineError as error:
            told = api_error(error)
            yield shaping.line(envelope(told.status, str(told), param=told.param, code=told.code))
        except ClientGone:
            return
        yield b"data: [DONE]\n\n"


async def _merged(answers: list[AsyncGenerator[EngineEvent, None]]) -> AsyncGenerator[Item, None]:
    """The events of several prompts as they come; the first failure is everybody's."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as only:
            async for event in only:
                yield 0, event
        return
    queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()

    async def pump(number: int, answer: AsyncGenerator[EngineEvent, None]) -> None:
        try:
            async with aclosing(answer) as events:
                async for event in events:
                    queue.put_nowait((number, event))
        except EngineError as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(request: Request, events: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The events, until whoever asked hangs up.

    Raises
        ClientGone: then.
    """

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.create_task(hang_up())
    following: asyncio.Future[Item] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(events))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise ClientGone
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        gone.cancel()
        if following is not None and not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)  # a generator cannot be closed while it runs
        await events.aclose()
