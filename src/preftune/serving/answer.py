"""One answer while it grows: what has been shown of it, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from preftune.modeling.decoder import Row
from preftune.modeling.pieces import GrowingText, token_bytes, token_text
from preftune.modeling.tokenizer import HubTokenizer
from preftune.serving.protocol import Ask, EngineEvent, Finished, Piece, Reason, TokenLogprob
from preftune.serving.sampling import Stream


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request with its prompt as ids, and how many tokens its answers may have."""

    ask: Ask
    tokenizer: HubTokenizer
    ids: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True, eq=False)
class Answer:
    """One choice of a request.

    row: its keys in the decoder, None while it waits. out: its tokens. ended: why, once it has ended.
    """

    prompt: Prompt
    index: int
    stream: Stream
    text: GrowingText
    ends: frozenset[int]
    row: Row | None = None
    out: list[int] = field(default_factory=list)
    ended: Reason | None = None
    _whole: str = ""
    _shown: int = 0
    _logprobs: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    _told: int = 0

    def before_next(self) -> None:
        """Nothing ends an answer before ``min_tokens``."""
        is_early = len(self.out) < self.prompt.ask.sampling.min_tokens
        self.stream.forbid(sorted(self.ends) if is_early else ())

    def start_with(self, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        """The echo of the prompt, which no stop text is looked for in."""
        self._whole = text
        self._logprobs = [(0, one) for one in logprobs]

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """A token was chosen; afterwards ``ended`` says whether it was the last one."""
        self.out.append(token)
        before = len(self._whole)
        if token in self.ends:
            self._end("stop")
            return
        if logprob is not None:
            self._logprobs.append((before, logprob))
        self._whole += self.text.add(token)
        if self._stopped(before):
            return
        if len(self.out) >= self.prompt.max_tokens:
            self._end("length")

    def cut_off(self) -> None:
        """There is no room for more."""
        self._end("length")

    def take(self) -> list[EngineEvent]:
        """What there is to tell: a piece where pieces are wanted, and the end."""
        ask = self.prompt.ask
        safe = len(self._whole) if self.ended else len(self._whole) - self._held()
        events: list[EngineEvent] = []
        if not ask.is_streamed:
            if self.ended:
                events.append(Finished(self.index, self.ended, self._whole, [one for _, one in self._logprobs]))
            return events
        if safe > self._shown or (self.ended and self._told < len(self._logprobs)):
            due = [one for start, one in self._logprobs[self._told :] if start < safe or self.ended]
            events.append(Piece(self.index, self._whole[self._shown : safe], due))
            self._shown, self._told = safe, self._told + len(due)
        if self.ended:
            events.append(Finished(self.index, self.ended))
        return events

    def _end(self, reason: Reason) -> None:
        self.ended = reason
        before = len(self._whole)
        self._whole += self.text.finish()
        self._stopped(before)

    def _stopped(self, before: int) -> bool:
        """Whether a stop text stands in what was added last; then the answer ends before it."""
        stops = self.prompt.ask.sampling.stop
        if not stops or len(self.out) < self.prompt.ask.sampling.min_tokens:
            return False
        start = max(self._shown, before - max(len(stop) for stop in stops) + 1)
        found = [at for stop in stops if (at := self._whole.find(stop, start)) >= 0]
        if not found:
            return False
        cut = min(found)
        self._whole = self._whole[:cut]
        self._logprobs = [(at, one) for at, one in self._logprobs if at < cut]
        self.ended = "stop"
        return True

    def _held(self) -> int:
        """Characters at the end that may become the start of a stop text."""
        most = 0
        for stop in self.prompt.ask.sampling.stop:
            for size in range(min(len(stop) - 1, len(self._whole) - self._shown), most, -1):
                if self._whole.endswith(stop[:size]):
                    most = size
                    break
        return most


def token_logprob(tokenizer: HubTokenizer, logits: Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of a token and of the ``count`` likeliest: logits (vocabulary,), float32, as the model gave them."""
    logps = torch.log_softmax(logits, -1)
    best = torch.topk(logps, min(count, len(logps))) if count else None
    top = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def shown(one: int) -> tuple[str, list[int]]:
        return token_text(tokenizer, one), token_bytes(tokenizer, one)

    rows = [(shown(one)[0], float(logp), shown(one)[1], one) for one, logp in top]
    text, raw = shown(token)
    return TokenLogprob(text, float(logps[token]), raw, token, rows)


def new_answers(prompt: Prompt) -> list[Answer]:
    """The choices of a request."""
    sampling = prompt.ask.sampling
    tokenizer = prompt.tokenizer
    own = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
    ends = own | frozenset(sampling.stop_ids)
    return [
        Answer(prompt, index, Stream(sampling, prompt.ids, index), GrowingText(tokenizer), ends)
        for index in range(prompt.ask.n)
    ]  # fmt: skip
