"""Chat and completions, one handler for every dialect: OpenAI's, Together's and SeekrFlow's paths."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from preftune.app.serving.names import served_model
from preftune.app.serving.service import Service
from preftune.core.errors import UsageError
from preftune.server.compat import shaping
from preftune.server.compat.asking import ChatRequest, CompletionRequest, chat_ask, completion_asks
from preftune.server.errors import ApiError, envelope
from preftune.server.security import Caller, CallerOf
from preftune.serving.protocol import Ask, EngineError, EngineEvent
from preftune.store.records import ModelVersion

router = APIRouter()
STATUS = {"bad_request": 400, "not_found": 404, "overloaded": 429, "unavailable": 503, "failed": 500}
Item = tuple[int, EngineEvent]  # the number of the prompt that an event belongs to


class ClientGone(Exception):
    """Whoever asked has hung up."""


@router.post("/v1/chat/completions")
@router.post("/v1/inference/chat/completions")
async def chat(request: Request, caller: CallerOf, body: ChatRequest) -> Response:
    """Answer a conversation."""
    model = await _model(request, caller, body.model)
    shape = shaping.Chat(_head("chatcmpl-"), body.model, body.is_counted, body.per_token)
    return await _respond(request, model, [chat_ask(body)], shape, is_streamed=bool(body.stream))


@router.post("/v1/completions")
@router.post("/v1/inference/completions")
async def complete(request: Request, caller: CallerOf, body: CompletionRequest) -> Response:
    """Go on with a text."""
    model = await _model(request, caller, body.model)
    is_together = request.headers.get("user-agent", "").lower().startswith(("together/", "asynctogether/"))
    shape = shaping.Text(_head("cmpl-"), body.model, body.is_counted, body.n or 1, is_together)
    return await _respond(request, model, completion_asks(body), shape, is_streamed=bool(body.stream))


def _head(prefix: str) -> tuple[str, int]:
    return f"{prefix}{secrets.token_hex(12)}", int(time.time())


async def _model(request: Request, caller: Caller, name: str) -> ModelVersion:
    caller.must_be("developer")
    try:
        return await run_in_threadpool(served_model, request.app.state.platform, caller.project, name)
    except UsageError as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None


async def _respond(
    request: Request, model: ModelVersion, asks: list[Ask], shape: shaping.Shape, *, is_streamed: bool
) -> Response:
    service: Service = request.app.state.serving
    events = _until_gone(request, _merged([service.answer(model, ask) for ask in asks]))
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
