"""Requests of chat and completions, in the words of every dialect, as one record for the engines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from preftune.server.errors import ApiError
from preftune.serving.protocol import Ask, Sampling

MOST_LOGPROBS = 20
Stop = str | Annotated[list[str], Field(max_length=16)] | None


class _Asked(BaseModel):
    """What both kinds of requests have. Unknown keys are kept, because clients send more than they document."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    echo: bool | None = None

    @property
    def is_counted(self) -> bool:
        """Whether a stream ends with a chunk of its token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, max_tokens: int | None) -> Sampling:
        """How tokens are chosen."""
        bias = self.logit_bias or {}
        if not all(token.isdigit() and len(token) < 10 for token in bias):
            raise ApiError(400, "logit_bias: its keys are token ids", param="logit_bias", code="invalid_value")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): value for token, value in bias.items()},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(one for one in stop if one),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(_Asked):
    """The body of ``/v1/chat/completions``. logprobs: a flag in OpenAI's and SeekrFlow's dialect, a number in Together's."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    @property
    def per_token(self) -> bool:
        """Whether log-probabilities are wanted in Together's form of a stream: one number a chunk."""
        return self.logprobs is not None and not isinstance(self.logprobs, bool)


class CompletionRequest(_Asked):
    """The body of ``/v1/completions``. prompt: a text, token ids, or several of either."""

    prompt: str | list[int] | Annotated[list[str], Field(max_length=128)] | Annotated[list[list[int]], Field(max_length=128)] = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


def chat_ask(body: ChatRequest) -> Ask:
    """A conversation as the engines take it.

    Raises
        ApiError: something that this server does not do.
    """
    _refuse_what_is_not_done(body)
    is_asked = body.logprobs is not None and body.logprobs is not False
    if body.top_logprobs and not is_asked:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    count = body.logprobs if body.per_token else body.top_logprobs
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return Ask(
        "", messages=[_turn(turn, place) for place, turn in enumerate(body.messages)], tools=body.tools or [],
        sampling=body.sampling(most or None), n=body.n or 1, is_streamed=bool(body.stream),
        logprobs=int(count or 0) if is_asked else None, echo=bool(body.echo),
    )  # fmt: skip


def completion_asks(body: CompletionRequest) -> list[Ask]:
    """One request per prompt.

    Raises
        ApiError: something that this server does not do.
    """
    if body.suffix:
        raise ApiError(400, "suffix is not offered: the models here write on, not in between", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of is not offered; ask for n and choose by logprobs", param="best_of")
    most = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default for this route
    if most == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 needs echo: true, which scores the prompt alone", param="max_tokens")
    given = body.prompt
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise ApiError(400, "prompt is empty; give a text or token ids", param="prompt")
    sampling = body.sampling(most)
    return [
        Ask(
            "", text=one if isinstance(one, str) else None, ids=None if isinstance(one, str) else one, sampling=sampling,
            n=body.n or 1, is_streamed=bool(body.stream), logprobs=body.logprobs, echo=bool(body.echo),
        )
        for one in prompts
    ]  # fmt: skip


def _refuse_what_is_not_done(body: ChatRequest) -> None:
    kind: Literal["text"] | Any = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise ApiError(400, f"response_format {kind!r} is not offered; there is text", param="response_format")
    if body.tools and body.tool_choice not in (None, "auto", "none"):
        raise ApiError(400, "tool_choice cannot force a call here; there is auto and none", param="tool_choice")
    if (body.model_extra or {}).get("chat_template_kwargs"):
        raise ApiError(400, "chat_template_kwargs is not offered", param="chat_template_kwargs")


def _turn(turn: dict[str, Any], place: int) -> dict[str, Any]:
    """A message with its content as text: parts are joined, OpenAI's ``developer`` is what everybody calls system."""
    where = f"messages.{place}"
    role = turn.get("role")
    if not isinstance(role, str):
        raise ApiError(400, f"{where}: role is missing", param=f"{where}.role", code="invalid_value")
    content = turn.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(
                    400, f"{where}: content has a part that is no text; the models here read text only",
                    param=f"{where}.content", code="invalid_value",
                )  # fmt: skip
            parts.append(part["text"])
        content = "".join(parts)
    if content is not None and not isinstance(content, str):
        raise ApiError(400, f"{where}: content is no text", param=f"{where}.content", code="invalid_value")
    kept = {key: turn[key] for key in ("tool_calls", "name", "tool_call_id") if turn.get(key) is not None}
    return {"role": "system" if role == "developer" else role, "content": content or "", **kept}
