"""Answers of engines in the forms that clients read: whole objects and chunks of streams."""

from __future__ import annotations

import json
from typing import Any, Protocol

from preftune.serving.protocol import EngineEvent, Finished, TokenLogprob, Usage

Row = dict[str, Any]


def line(row: Row) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Shape(Protocol):
    """One form of an answer; its events are those of one request or of several prompts, by number."""

    def take(self, number: int, event: EngineEvent) -> None:
        """Note an event of an answer that is not streamed."""

    def whole(self) -> Row:
        """The answer, once all is told."""

    def chunks(self, number: int, event: EngineEvent) -> list[Row]:
        """What a stream says of an event."""

    def last(self) -> list[Row]:
        """What a stream says at its end."""


class _Counted:
    """What both forms share: the head of every object, and the tokens so far."""

    name = ""

    def __init__(self, head: tuple[str, int], model: str, is_counted: bool) -> None:
        self.id, created = head
        self.head: Row = {"id": self.id, "created": created, "model": model}
        self.is_counted = is_counted
        self.prompt_tokens = self.completion_tokens = 0
        self.choices: dict[int, Row] = {}

    def count(self, usage: Usage) -> None:
        """Add what one prompt took."""
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens

    def usage(self) -> Row:
        """Tokens in all."""
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    def chunk(self, choices: list[Row], usage: Row | None = None) -> Row:
        """A chunk; with counts asked for, every one has the key."""
        row = {**self.head, "object": self.name, "choices": choices}
        return {**row, "usage": usage} if self.is_counted else row

    def last(self) -> list[Row]:
        """The counts, where they were asked for."""
        return [self.chunk([], self.usage())] if self.is_counted else []


class Chat(_Counted):
    """``chat.completion``. per_token: Together's stream of log-probabilities, a token and its number in each chunk."""

    name = "chat.completion.chunk"

    def __init__(self, head: tuple[str, int], model: str, is_counted: bool, per_token: bool) -> None:
        super().__init__(head, model, is_counted)
        self.per_token = per_token

    def take(self, number: int, event: EngineEvent) -> None:
        """Note an event of an answer that is not streamed."""
        del number  # a conversation is one prompt
        if isinstance(event, Usage):
            self.count(event)
        elif isinstance(event, Finished):
            self.choices[event.choice] = {
                "index": event.choice,
                "message": {"role": "assistant", "content": event.text, "refusal": None},
                "finish_reason": event.reason,
                "logprobs": _chat_logprobs(event.logprobs) if event.logprobs else None,
            }

    def whole(self) -> Row:
        """The answer, once all is told."""
        choices = [self.choices[index] for index in sorted(self.choices)]
        return {**self.head, "object": "chat.completion", "prompt": [], "choices": choices, "usage": self.usage()}

    def chunks(self, number: int, event: EngineEvent) -> list[Row]:
        """What a stream says of an event. The role is in every chunk, because Together's client wants it there."""
        del number
        if isinstance(event, Usage):
            self.count(event)
            return []
        if isinstance(event, Finished):
            return [self._chunk(event.choice, "", event.reason, None)]
        if self.per_token and event.logprobs:
            *before, end = event.logprobs
            rows = [self._chunk(event.choice, "", None, one.logprob) for one in before]
            return [*rows, self._chunk(event.choice, event.text, None, end.logprob)]
        logprobs = {"content": [_token(one) for one in event.logprobs], "refusal": None} if event.logprobs else None
        return [self._chunk(event.choice, event.text, None, logprobs)]

    def _chunk(self, choice: int, text: str, reason: str | None, logprobs: Any) -> Row:
        delta = {"role": "assistant", "content": text}
        return self.chunk([{"index": choice, "delta": delta, "finish_reason": reason, "logprobs": logprobs}])


class Text(_Counted):
    """``text_completion``, of several prompts with ``n`` choices each; Together names the object otherwise."""

    def __init__(self, head: tuple[str, int], model: str, is_counted: bool, n: int, is_together: bool) -> None:
        super().__init__(head, model, is_counted)
        self.n = n
        self.is_together = is_together
        self.name = "completion.chunk" if is_together else "text_completion"
        self._offsets: dict[int, int] = {}

    def take(self, number: int, event: EngineEvent) -> None:
        """Note an event of an answer that is not streamed."""
        if isinstance(event, Usage):
            self.count(event)
        elif isinstance(event, Finished):
            index = number * self.n + event.choice
            self.choices[index] = self._choice(index, event.text, event.reason, event.logprobs)

    def whole(self) -> Row:
        """The answer, once all is told."""
        choices = [self.choices[index] for index in sorted(self.choices)]
        name = "text.completion" if self.is_together else "text_completion"
        row = {**self.head, "object": name, "choices": choices, "usage": self.usage()}
        return {**row, "prompt": []} if self.is_together else row

    def chunks(self, number: int, event: EngineEvent) -> list[Row]:
        """What a stream says of an event."""
        if isinstance(event, Usage):
            self.count(event)
            return []
        index = number * self.n + event.choice
        if isinstance(event, Finished):
            return [self.chunk([self._choice(index, "", event.reason, [])])]
        row = self.chunk([self._choice(index, event.text, None, event.logprobs)])
        if self.is_together:
            end = event.logprobs[-1] if event.logprobs else None
            row["token"] = {
                "id": end.id if end else 0, "logprob": end.logprob if end else 0.0, "special": False, "text": event.text,
            }  # fmt: skip
        return [row]

    def _choice(self, index: int, text: str, reason: str | None, logprobs: list[TokenLogprob]) -> Row:
        shown = self._logprobs(index, logprobs) if logprobs else None
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": shown}

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> Row:
        offsets, at = [], self._offsets.get(index, 0)
        for one in logprobs:
            offsets.append(at)
            at += len(one.token)
        self._offsets[index] = at
        return {
            "tokens": [one.token for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "token_ids": [one.id for one in logprobs],
            "top_logprobs": [None if one.logprob is None else {text: logp for text, logp, _, _ in one.top} for one in logprobs],
            "text_offset": offsets,
        }  # fmt: skip


def _chat_logprobs(logprobs: list[TokenLogprob]) -> Row:
    """One object that is valid for every client: OpenAI's ``content``, and Together's lists."""
    return {
        "content": [_token(one) for one in logprobs],
        "refusal": None,
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "token_ids": [one.id for one in logprobs],
    }


def _token(one: TokenLogprob) -> Row:
    top = [{"token": text, "logprob": logp, "bytes": raw} for text, logp, raw, _ in one.top]
    return {"token": one.token, "logprob": one.logprob, "bytes": one.bytes, "top_logprobs": top}
