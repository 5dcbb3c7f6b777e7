"""Continuous batching: requests join and leave at every step.

A step is one forward pass. Every answer that grows gets its newest token, and what is left of the step's budget goes to
prompts that are being read, so that a long prompt slows the others down and does not stop them. Keys are kept within a
limit: where answers outgrow it, the youngest one is put back into the queue and read again later, with the tokens it
has; its own stream of numbers goes on, so its text is the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preftune.core.errors import BadRow, InputError
from preftune.core.records import ROLES, Message
from preftune.data.tokenize import prompt_ids_of
from preftune.modeling.decoder import Decoder, Feed, Row
from preftune.modeling.generate import prompt_ids
from preftune.modeling.tokenizer import HubTokenizer
from preftune.serving.answer import Answer, Prompt, new_answers, token_logprob
from preftune.serving.protocol import Ask, EngineError, EngineEvent, TokenLogprob, Usage
from preftune.serving.sampling import choose


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one engine. rows: answers that grow at once. waiting: requests in the queue. reading: prompt tokens a step.

    kept_bytes: of keys and values. positions: tokens that a conversation may have.
    """

    rows: int = 32
    waiting: int = 256
    reading: int = 512
    kept_bytes: int = 2 << 30
    positions: int = 1 << 30


@dataclass(slots=True, eq=False)
class _Reading:
    """A prompt on its way in, for one answer or several. at: tokens read. logits: of the echo, all but the last."""

    answers: list[Answer]
    adapter: int
    ids: list[int]
    row: Row | None = None
    at: int = 0
    echo: list[TokenLogprob] = field(default_factory=list)


class Batcher:
    """Answers requests; ``step`` does a bit of work. One thread only.

    Parameters
        emit: told of every event or failure, with the request's id.
    """

    def __init__(self, decoder: Decoder, limits: Limits, emit: Callable[[str, EngineEvent | EngineError], None]) -> None:
        self._decoder, self._limits, self._emit = decoder, limits, emit
        self._waiting: deque[_Reading] = deque()
        self._reading: list[_Reading] = []
        self._growing: list[Answer] = []
        self._adapters: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._seconds = 2.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or grows."""
        return not (self._waiting or self._reading or self._growing)

    @property
    def counts(self) -> dict[str, int]:
        """Answers that grow, prompts that are read, and requests that wait."""
        return {"growing": len(self._growing), "reading": len(self._reading), "waiting": len(self._waiting)}

    def adapters_in_use(self) -> set[int]:
        """Numbers of the adapters that some request needs."""
        return {self._adapters[request] for request in self._left}

    def submit(self, prompt: Prompt, adapter: int) -> None:
        """Queue a request.

        Raises
            EngineError: the queue is full; more choices than rows; a prompt that the kept keys have no room for.
        """
        ask = prompt.ask
        if ask.n > self._limits.rows:
            raise EngineError("bad_request", f"n is {ask.n}, this server answers at most {self._limits.rows}", param="n")
        if self._decoder.bytes_of(len(prompt.ids) + 1) * ask.n > self._limits.kept_bytes:
            raise EngineError(
                "bad_request", f"the prompt's {len(prompt.ids)} tokens, {ask.n} times, do not fit into the memory for keys; "
                "shorten it, or ask for fewer choices", code="context_length_exceeded", param="messages",
            )  # fmt: skip
        if len(self._waiting) >= self._limits.waiting:
            wait = max(1.0, self._seconds * len(self._waiting) / self._limits.rows)
            raise EngineError(
                "overloaded", f"{len(self._waiting)} requests wait already; try again in {wait:.0f} s",
                code="queue_full", retry_after=wait,
            )  # fmt: skip
        self._left[ask.id], self._tokens[ask.id], self._adapters[ask.id] = ask.n, 0, adapter
        self._started[ask.id] = time.monotonic()
        self._waiting.append(_Reading(new_answers(prompt), adapter, list(prompt.ids)))

    def cancel(self, request: str) -> None:
        """Forget a request; nothing more is told of it."""
        self._waiting = deque(one for one in self._waiting if one.answers[0].prompt.ask.id != request)
        for reading in [one for one in self._reading if one.answers[0].prompt.ask.id == request]:
            self._close(reading.row)
            self._reading.remove(reading)
        for answer in [one for one in self._growing if one.prompt.ask.id == request]:
            self._close(answer.row)
            self._growing.remove(answer)
        self._forget(request)

    def step(self) -> bool:
        """One forward pass; whether there was anything to do."""
        self._make_room()
        self._admit()
        feeds = [Feed(answer.row, answer.out[-1:]) for answer in self._growing if answer.row is not None]
        read = self._pieces()
        feeds += [feed for _, feed in read]
        if not feeds:
            return False
        logits = self._decoder.forward(feeds)
        due = list(zip(self._growing, logits, strict=False))
        for (reading, feed), part in zip(read, logits[len(self._growing) :], strict=True):
            due += self._was_read(reading, feed, part)
        self._choose(due)
        return True

    def _choose(self, due: list[tuple[Answer, Tensor]]) -> None:
        if not due:
            return
        stacked = torch.cat([part[-1:] for _, part in due])
        bad = (~torch.isfinite(stacked.amax(-1))).tolist()
        for (answer, _), is_bad in zip(due, bad, strict=True):
            if is_bad:
                self._fail(answer.prompt.ask.id, EngineError("failed", "the model gave logits that are not numbers"))
        kept = [number for number, (answer, _) in enumerate(due) if answer.prompt.ask.id in self._left]
        if not kept:
            return
        answers = [due[number][0] for number in kept]
        stacked = stacked if len(kept) == len(due) else stacked[kept]
        for answer in answers:
            answer.before_next()
        tokens = choose(stacked, [answer.stream for answer in answers])
        for number, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
            count = answer.prompt.ask.logprobs
            logprob = None if count is None else token_logprob(answer.prompt.tokenizer, stacked[number], token, count)
            answer.add(token, logprob)
            self._tell(answer)

    def _tell(self, answer: Answer) -> None:
        request = answer.prompt.ask.id
        for event in answer.take():
            self._emit(request, event)
        if answer.ended is None:
            return
        if answer in self._growing:
            self._growing.remove(answer)
        self._close(answer.row)
        answer.row = None
        self._tokens[request] += len(answer.out)
        self._left[request] -= 1
        if self._left[request] == 0:
            self._emit(request, Usage(len(answer.prompt.ids), self._tokens[request]))
            self._seconds += 0.1 * (time.monotonic() - self._started[request] - self._seconds)
            self._forget(request)

    def _was_read(self, reading: _Reading, feed: Feed, logits: Tensor) -> list[tuple[Answer, Tensor]]:
        """A piece was read; at the end of the prompt, its answers with the logits of their first token."""
        if feed.wants == "all":
            self._note_echo(reading, len(feed.ids), logits)
        reading.at += len(feed.ids)
        if reading.at < len(reading.ids) or reading.row is None:
            return []
        self._reading.remove(reading)
        rows = [reading.row, *(self._decoder.fork(reading.row) for _ in reading.answers[1:])]
        for answer, row in zip(reading.answers, rows, strict=True):
            answer.row = row
            self._decoder.settle(row)
            self._growing.append(answer)
            if answer.prompt.ask.echo and not answer.out:
                text = answer.prompt.ask.text
                answer.start_with(answer.prompt.tokenizer.decode(reading.ids) if text is None else text, reading.echo)
        if reading.answers[0].prompt.max_tokens == 0:
            for answer in reading.answers:
                answer.cut_off()
                self._tell(answer)
            return []
        return [(answer, logits) for answer in reading.answers]

    def _note_echo(self, reading: _Reading, count: int, logits: Tensor) -> None:
        """The log-probabilities of the prompt's own tokens: place t is scored by the logits of place t - 1."""
        prompt = reading.answers[0].prompt
        top = prompt.ask.logprobs or 0
        if reading.at == 0:
            first = token_logprob(prompt.tokenizer, logits[0], reading.ids[0], 0)
            reading.echo.append(TokenLogprob(first.token, None, first.bytes, first.id))
        following = reading.ids[reading.at + 1 : reading.at + 1 + count]
        reading.echo += [token_logprob(prompt.tokenizer, row, token, top) for row, token in zip(logits, following, strict=False)]

    def _pieces(self) -> list[tuple[_Reading, Feed]]:
        """What of the prompts is read in this step."""
        budget, found = self._limits.reading, []
        for reading in self._reading:
            count = min(len(reading.ids) - reading.at, budget)
            if count <= 0 or reading.row is None:
                break
            is_last = reading.at + count == len(reading.ids)
            ask = reading.answers[0].prompt.ask
            is_scored = ask.echo and ask.logprobs is not None and not reading.answers[0].out
            wants = "all" if is_scored else "last" if is_last else "none"
            found.append((reading, Feed(reading.row, reading.ids[reading.at : reading.at + count], wants)))
            budget -= count
        return found

    def _admit(self) -> None:
        """Begin to read prompts while there are rows and memory for their answers; in the order of the queue."""
        used = self._used()
        rows = len(self._growing) + sum(len(one.answers) for one in self._reading)
        while self._waiting:
            first = self._waiting[0]
            need = self._decoder.bytes_of(len(first.ids) + 1) * len(first.answers)
            if rows + len(first.answers) > self._limits.rows or (rows and used + need > self._limits.kept_bytes):
                return
            first.row = self._decoder.open(first.adapter)
            self._reading.append(self._waiting.popleft())
            rows, used = rows + len(first.answers), used + need

    def _used(self) -> int:
        growing = sum(self._decoder.bytes_of(answer.row.length + 1) for answer in self._growing if answer.row is not None)
        return growing + sum(self._decoder.bytes_of(len(one.ids) + 1) * len(one.answers) for one in self._reading)

    def _make_room(self) -> None:
        """Put the youngest answers back while those that grow would outgrow the memory; the last one left ends."""
        while self._growing and self._used() > self._limits.kept_bytes:
            youngest = self._growing[-1]
            if len(self._growing) == 1 and not self._reading:
                youngest.cut_off()
                self._tell(youngest)
                return
            self._growing.pop()
            self._close(youngest.row)
            youngest.row = None
            adapter = self._adapters[youngest.prompt.ask.id]
            self._waiting.appendleft(_Reading([youngest], adapter, [*youngest.prompt.ids, *youngest.out]))

    def _fail(self, request: str, error: EngineError) -> None:
        if request in self._left:
            self.cancel(request)
            self._emit(request, error)

    def _close(self, row: Row | None) -> None:
        if row is not None:
            self._decoder.close(row)

    def _forget(self, request: str) -> None:
        for kept in (self._left, self._tokens, self._adapters, self._started):
            kept.pop(request, None)


def read_prompt(tokenizer: HubTokenizer, ask: Ask, positions: int) -> Prompt:
    """A request's prompt as ids, as training puts it before a completion.

    Raises
        EngineError: no chat template, turns that it refuses, an empty prompt, one that leaves no position for an answer.
    """
    ids = _ids_of(tokenizer, ask)
    if not ids:
        raise EngineError("bad_request", "the prompt is empty", param="prompt" if ask.messages is None else "messages")
    vocabulary = len(tokenizer.raw)
    if ask.ids is not None and not all(0 <= token < vocabulary for token in ids):
        raise EngineError("bad_request", f"a token id lies outside the vocabulary of {vocabulary}", param="prompt")
    room = positions - len(ids)
    wanted = ask.sampling.max_tokens
    if room < (0 if wanted == 0 else 1):
        raise EngineError(
            "bad_request", f"the prompt has {len(ids)} tokens and the model {positions} positions; shorten it",
            code="context_length_exceeded", param="prompt" if ask.messages is None else "messages",
        )  # fmt: skip
    return Prompt(ask, tokenizer, tuple(ids), room if wanted is None else min(wanted, room))


def _ids_of(tokenizer: HubTokenizer, ask: Ask) -> list[int]:
    if ask.ids is not None:
        return list(ask.ids)
    if ask.text is not None:
        return prompt_ids(tokenizer, ask.text) if ask.text else []
    if not tokenizer.has_chat_template:
        raise EngineError(
            "bad_request", f"{tokenizer.name}: has no chat template, so it cannot answer turns; use /v1/completions, or serve it "
            "with a tokenizer that has one", code="no_chat_template", param="messages",
        )  # fmt: skip
    turns = []
    for turn in ask.messages or []:
        if turn.get("role") not in ROLES:
            raise EngineError(
                "bad_request", f"messages: role {turn.get('role')!r} is none of {', '.join(ROLES)}", param="messages"
            )
        calls, name, answers = tuple(turn.get("tool_calls") or ()), turn.get("name"), turn.get("tool_call_id")
        turns.append(Message(turn["role"], turn.get("content") or "", calls, name, answers))
    try:
        return list(prompt_ids_of(tuple(turns), tokenizer, tools=tuple(ask.tools)))
    except (BadRow, InputError) as error:
        raise EngineError("bad_request", f"messages: {error}", code="template_refused", param="messages") from None
