"""A conversation with a model, and with a second one beside it whose answers are compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preftune.app.named import find_named
from preftune.core.errors import InputError
from preftune.core.files import append_jsonl, write_text
from preftune.core.ids import digest_json
from preftune.core.recipe import DecodingConfig
from preftune.core.records import Message

if TYPE_CHECKING:
    from preftune.modeling.load import LoadedModel

Choice = Literal["first", "second", "tie"]


@dataclass(slots=True)
class Contest:
    """Two answers to one prompt, in an order that does not tell whose they are.

    is_swapped: the baseline's answer stands first.
    """

    first: str
    second: str
    is_swapped: bool

    def own(self) -> str:
        """The answer of the model that is talked to."""
        return self.second if self.is_swapped else self.first


class Chat:
    """Turns so far and the model that answers them.

    A model without a chat template goes on writing the text so far: the turns are joined by line feeds.

    Parameters
        given: a run, ``RUN@STEP``, a folder, a hub id or ``starter``.
        seed: of the first answer; every answer draws its own numbers from it and the number of turns.
    """

    def __init__(self, given: str, output: Path, decoding: DecodingConfig, seed: int = 0, system: str | None = None) -> None:
        self.name = given
        self.decoding, self.seed, self.output = decoding, seed, output
        self.system = system
        self.turns: list[Message] = []
        self.baseline: tuple[str, LoadedModel] | None = None
        self._asked = 0
        self._loaded = self._load(given)

    @property
    def is_text(self) -> bool:
        """Whether the model has no chat template."""
        return not self._loaded.tokenizer.has_chat_template

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.turns.append(Message("user", text))
        self._asked += 1

    def answer(self, *, of_baseline: bool = False) -> Iterator[str]:
        """Pieces of the answer to what was said last; ``keep`` adds it to the turns."""
        from preftune.modeling.stream import stream

        loaded = self._loaded if not of_baseline or self.baseline is None else self.baseline[1]
        prompt = self._prompt(loaded)
        yield from stream(loaded.model, loaded.tokenizer, prompt, self.decoding, self.seed * 1_000_003 + self._asked)

    def keep(self, text: str) -> None:
        """Make an answer part of the conversation."""
        self.turns.append(Message("assistant", text))

    def take_back(self) -> None:
        """Forget what the user said last, because it has no answer."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.turns.clear()

    def compare_with(self, given: str) -> None:
        """Put a second model beside the first."""
        self.baseline = (given, self._load(given))

    def contest(self) -> Contest:
        """Both answers, in an order drawn by the seed and the prompt."""
        own, other = "".join(self.answer()), "".join(self.answer(of_baseline=True))
        key = digest_json([self.seed, self._asked, self.turns[-1].content])
        is_swapped = random.Random(key).random() < 0.5
        return Contest(other, own, True) if is_swapped else Contest(own, other, False)

    def record(self, contest: Contest, label: Choice, file: Path) -> None:
        """Append a judgement as a row of the format ``comparison``; the better answer goes on in the conversation."""
        row: dict[str, Any] = {"prompt": self._rows(), "first": contest.first, "second": contest.second, "label": label}
        if self.is_text:
            row["prompt"] = self._text()
        names = [self.name, self.baseline[0] if self.baseline else ""]
        append_jsonl(file, {**row, "models": names[::-1] if contest.is_swapped else names})
        self.keep({"first": contest.first, "second": contest.second, "tie": contest.own()}[label])

    def save(self, file: Path) -> None:
        """The conversation as one row of the format ``messages``."""
        import json

        if not any(turn.role == "assistant" for turn in self.turns):
            raise InputError("nothing to save: there is no answer yet")
        write_text(file, json.dumps({"messages": self._rows()}, ensure_ascii=False) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        turns = [Message("system", self.system)] if self.system else []
        return [turn.to_dict() for turn in (*turns, *self.turns)]

    def _prompt(self, loaded: LoadedModel) -> Any:
        if not loaded.tokenizer.has_chat_template:
            return self._text()
        system = [Message("system", self.system)] if self.system else []
        return (*system, *self.turns)

    def _text(self) -> str:
        system = [self.system] if self.system else []
        return "\n".join([*system, *(turn.content for turn in self.turns)])

    def _load(self, given: str) -> LoadedModel:
        from preftune.modeling.load import load_model

        return load_model(find_named(given, self.output).config, precision="float32")
