"""Models that are asked: a registered one in this process, or one behind an address that a user named."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from preftune.core.errors import InputError, PreftuneError
from preftune.core.records import Message, Messages

TOKEN_VARIABLE = "PREFTUNE_EVALUATION_TOKEN"  # noqa: S105 -- the name of a variable, no secret
Turns: TypeAlias = Sequence[tuple[str, str]]  # role and content
MAX_SCORES = 101
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Written:
    """An answer, and how many tokens the prompt and the answer have where that is known."""

    text: str
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is sampled."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


class Asked(Protocol):
    """A model that answers, chooses a label or gives a number."""

    def answers(self, asked: Sequence[Turns], sampling: Sampling) -> list[Written | None]:
        """An answer to each, None where there is none."""

    def choose(self, turns: Turns, labels: Sequence[str]) -> str | None:
        """The label that fits best, None where the model names none."""

    def score(self, turns: Turns, low: float, high: float) -> float | None:
        """A number in a range, None where the model gives none."""


@dataclass(slots=True)
class LocalModel:
    """A registered model, loaded here. Labels and numbers are chosen by their probability: no answer is malformed.

    folder: of the model on this machine.
    """

    folder: str
    _loaded: Any = field(default=None, repr=False)

    def answers(self, asked: Sequence[Turns], sampling: Sampling) -> list[Written | None]:
        """Answers, sampled in batches; None for a prompt that leaves no room."""
        from preftune.core.recipe import DecodingConfig
        from preftune.modeling.generate import generate

        loaded = self._model()
        rows = [self._ids(turns) for turns in asked]
        room = loaded.max_positions - 1
        fit = [index for index, ids in enumerate(rows) if 0 < len(ids) < room]
        decoding = DecodingConfig(temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=sampling.max_tokens)
        written = generate(loaded.model, loaded.tokenizer, [rows[index] for index in fit], decoding, sampling.seed) if fit else []
        found: list[Written | None] = [None] * len(rows)
        for index, one in zip(fit, written, strict=True):
            found[index] = Written(one.text, len(rows[index]), one.num_tokens, one.is_complete)
        return found

    def choose(self, turns: Turns, labels: Sequence[str]) -> str | None:
        """The label of the greatest probability as the whole answer."""
        logps = self._logps(turns, labels)
        return None if logps is None else labels[max(range(len(labels)), key=logps.__getitem__)]

    def score(self, turns: Turns, low: float, high: float) -> float | None:
        """The mean of the whole numbers of the range (eleven even steps of a range below 2), by their probability."""
        if high - low >= 2:
            values = [float(number) for number in range(math.ceil(low), math.floor(high) + 1)][:MAX_SCORES]
        else:
            values = [low + (high - low) * step / 10 for step in range(11)]
        logps = self._logps(turns, [f"{value:g}" for value in values])
        if logps is None:
            return None
        most = max(logps)
        weights = [math.exp(logp - most) for logp in logps]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    def shares(self, turns: Turns, labels: Sequence[str]) -> list[float] | None:
        """The probability of each label among the labels."""
        logps = self._logps(turns, labels)
        if logps is None:
            return None
        most = max(logps)
        weights = [math.exp(logp - most) for logp in logps]
        return [weight / sum(weights) for weight in weights]

    def _logps(self, turns: Turns, texts: Sequence[str]) -> list[float] | None:
        """log p of each text as the beginning of the answer, and its end; None where they do not fit."""
        import torch

        from preftune.modeling.attention import plain_attention
        from preftune.modeling.forward import base_of

        loaded = self._model()
        prompt, found = self._ids(turns), []
        ends = sorted(loaded.tokenizer.eos_ids)[:1]
        for text in texts:
            label = [*loaded.tokenizer.encode(text, add_special_tokens=False), *ends]
            if not label or len(prompt) + len(label) > loaded.max_positions:
                return None
            ids = torch.tensor([prompt + label], device=next(loaded.model.parameters()).device)
            with torch.inference_mode(), plain_attention(base_of(loaded.model)):
                logits = loaded.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
                logps = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])
            found.append(float(logps.sum()))
        return found

    def _ids(self, turns: Turns) -> list[int]:
        """The prompt's tokens; a template that knows no system turn gets it at the head of the first user's."""
        from preftune.modeling.generate import prompt_ids

        messages = _messages(turns)
        tokenizer = self._model().tokenizer
        if not tokenizer.has_chat_template:
            return prompt_ids(tokenizer, "\n\n".join(message.content for message in messages) + "\n\n")
        try:
            return prompt_ids(tokenizer, messages)
        except InputError:
            return prompt_ids(tokenizer, (Message("user", "\n\n".join(message.content for message in messages)),))

    def _model(self) -> Any:
        if self._loaded is None:
            from preftune.core.recipe import ModelConfig
            from preftune.modeling.load import load_model

            self._loaded = load_model(ModelConfig(name=self.folder), precision="float32")
            self._loaded.model.eval()
        return self._loaded


@dataclass(slots=True)
class ExternalModel:
    """A model behind an OpenAI-compatible address; whether the address may be reached is the process's policy."""

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    _client: Any = field(default=None, repr=False)

    def answers(self, asked: Sequence[Turns], sampling: Sampling) -> list[Written | None]:
        """Answers, one after another; None where the server gave none."""
        return [self._ask(turns, sampling.temperature, sampling.max_tokens, sampling.seed) for turns in asked]

    def choose(self, turns: Turns, labels: Sequence[str]) -> str | None:
        """The one label that the answer is, or names."""
        written = self._ask(turns, self.temperature, self.max_tokens, 0)
        return None if written is None else label_in(written.text, labels)

    def score(self, turns: Turns, low: float, high: float) -> float | None:
        """The last number of the answer, if it lies in the range."""
        written = self._ask(turns, self.temperature, self.max_tokens, 0)
        numbers = [] if written is None else _NUMBER.findall(written.text)
        value = float(numbers[-1]) if numbers else math.nan
        return value if low <= value <= high else None

    def _ask(self, turns: Turns, temperature: float, max_tokens: int, seed: int) -> Written | None:
        from preftune.judging.llm_client import Account, ChatClient, GivenUp, Limits, read_key

        if self._client is None:
            base = self.url.rstrip("/")
            address = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
            import os

            key = read_key(TOKEN_VARIABLE) if os.environ.get(TOKEN_VARIABLE) else None
            self._client = ChatClient(address, key, TOKEN_VARIABLE, Limits(60.0, 4, 60.0, 4), Account())
        body = {
            "model": self.model, "messages": [{"role": role, "content": text} for role, text in turns],
            "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
        }  # fmt: skip
        try:
            reply = self._client.post(body, random.Random(0))
        except GivenUp:
            return None
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return None
        return Written(text) if isinstance(text, str) else None


def label_in(text: str, labels: Sequence[str]) -> str | None:
    """The one label that a text is, or that is its only one.

    >>> label_in("Verdict: good.", ["good", "bad"]), label_in("good or bad", ["good", "bad"])
    ('good', None)
    """
    said = text.strip().strip(".*_`\"' ").casefold()
    exact = [label for label in labels if label.casefold() == said]
    if exact:
        return exact[0]
    named = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", said)]
    return named[0] if len(named) == 1 else None


def model_of(spec: Mapping[str, Any]) -> LocalModel | ExternalModel:
    """What a task says of a model: ``folder`` of a registered one, or ``url`` and ``model``."""
    if spec.get("url"):
        return ExternalModel(
            str(spec["url"]), str(spec["model"]), float(spec.get("temperature", 0.0)), int(spec.get("max_tokens", 512))
        )
    if not spec.get("folder"):
        raise PreftuneError("a model of the evaluation has neither a folder nor an address")
    return LocalModel(str(spec["folder"]))


def _messages(turns: Turns) -> Messages:
    return tuple(Message("system" if role == "developer" else role, text) for role, text in turns)  # type: ignore[arg-type]  # routes take only these roles
