"""What is asked of an engine and what it answers: plain records that travel as JSON lines. No torch here.

An answer is a sequence of events: ``Piece`` whenever there is new text (only where they are streamed), one ``Finished``
per choice and one ``Usage`` at the end; or an ``EngineError`` instead of whatever is left.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from preftune.core.errors import PreftuneError

Fault: TypeAlias = Literal["bad_request", "not_found", "overloaded", "unavailable", "failed"]
Reason: TypeAlias = Literal["stop", "length", "cancelled"]


class EngineError(PreftuneError):
    """An engine did not answer.

    kind: whose fault it is. code, param: as the API's envelope has them. retry_after: seconds, where trying again helps.
    """

    def __init__(
        self, kind: Fault, message: str, *, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.code, self.param, self.retry_after = kind, code, param, retry_after


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, in this order.

    repetition_penalty: logits of tokens of prompt and answer are divided by it where positive, else multiplied (Keskar
    et al. 2019, section 4.1). presence_penalty, frequency_penalty: taken from the logits of tokens of the answer, once and
    per occurrence. logit_bias: token to what is added. temperature: divides the logits, 0 is greedy. top_k (0 = all),
    then top_p (the smallest set that reaches it), then min_p (relative to the likeliest). seed: of the choice's own stream
    of numbers; None draws one.
    max_tokens: of the answer, None up to the last position. min_tokens: before which nothing ends it. stop: texts before
    which it ends. stop_ids: tokens that end it. ignore_eos: the model's own end tokens do not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Parameters
        id: the caller's. adapter: folder of the adapter on the engine's base, "" for the base itself. model: its name, for
            engines that go by names.
        messages, text, ids: exactly one is given: turns for the chat template, raw text, or token ids.
        tools: schemas for the chat template.
        n: choices. is_streamed: whether pieces are wanted. logprobs: alternatives per token (0: the token's own alone), None
            for none. echo: the prompt is part of the answer (with log-probabilities, if these are asked for).
    """

    id: str
    adapter: str = ""
    model: str = ""
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    is_streamed: bool = False
    logprobs: int | None = None
    echo: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Ask:
        """From JSON, whose keys are texts."""
        given = dict(row["sampling"])
        given["logit_bias"] = {int(token): float(bias) for token, bias in given["logit_bias"].items()}
        given["stop"], given["stop_ids"] = tuple(given["stop"]), tuple(given["stop_ids"])
        return cls(**{**row, "sampling": Sampling(**given)})


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer: its text and bytes, its log-probability (nats, of the model itself: before temperature,
    penalties and truncation), and the likeliest tokens at its place, best first. logprob None: the first of a prompt."""

    token: str
    logprob: float | None
    bytes: list[int]
    id: int
    top: list[tuple[str, float, list[int], int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a choice, with the tokens that it is of where log-probabilities were asked for."""

    choice: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice has ended. text: all of it, where pieces were not streamed (else "")."""

    choice: int
    reason: Reason
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of all choices, end tokens included: what was computed."""

    prompt_tokens: int
    completion_tokens: int


EngineEvent: TypeAlias = Piece | Finished | Usage
_KINDS: dict[str, type[Any]] = {"piece": Piece, "finished": Finished, "usage": Usage}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_row(event: EngineEvent | EngineError) -> dict[str, Any]:
    """An event as JSON.

    >>> from_row(to_row(Usage(3, 4)))
    Usage(prompt_tokens=3, completion_tokens=4)
    """
    if isinstance(event, EngineError):
        return {
            "event": "error", "kind": event.kind, "message": str(event), "code": event.code, "param": event.param,
            "retry_after": event.retry_after,
        }  # fmt: skip
    return {"event": _NAMES[type(event)], **asdict(event)}


def from_row(row: dict[str, Any]) -> EngineEvent | EngineError:
    """An event from JSON."""
    given = dict(row)
    name = given.pop("event")
    if name == "error":
        message = given.pop("message")
        return EngineError(given.pop("kind"), message, **given)
    if "logprobs" in given:
        given["logprobs"] = [
            TokenLogprob(**{**one, "top": [tuple(other) for other in one["top"]]}) for one in given["logprobs"]
        ]  # fmt: skip
    made: EngineEvent = _KINDS[name](**given)
    return made


class Engine(Protocol):
    """Answers for one base and the adapters on it."""

    def answer(self, ask: Ask) -> AsyncGenerator[EngineEvent, None]:
        """The events of a request; closing the iterator cancels it.

        Raises
            EngineError: before the first event, or later.
        """

    async def close(self) -> None:
        """Let go of everything; requests that run end with an EngineError."""
