"""Comparisons by people: Chatbot Arena's battles, PandaLM's three annotators, AWS Nova's candidates, Orca's pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from preftune.core.errors import BadRow
from preftune.core.records import Example, Message, Messages, Preference, Provenance
from preftune.data.formats.alpaca import instruction_of
from preftune.data.formats.base import Row, Style, formats, has
from preftune.data.formats.pairs import chat_pair, refuse_text
from preftune.data.formats.trl_preference import split_turns
from preftune.data.formats.turns import assistant, text_field, turns, user
from preftune.data.sources.base import kind_of

Label = Literal["first", "second", "tie"]
ARENA: Mapping[str, Label] = {
    "model_a": "first", "model_b": "second", "tie": "tie", "tie (bothbad)": "tie", "bothbad": "tie", "both_bad": "tie",
}  # fmt: skip
PANDALM: Mapping[int, Label] = {0: "tie", 1: "first", 2: "second"}


@formats.register("chatbot-arena")
@dataclass(frozen=True, slots=True)
class ChatbotArena:
    """Battles: ``conversation_a``, ``conversation_b``, ``winner`` (a tie, "both bad" too, is a tie); and the Kaggle form.

    The prompt is the turns that both begin with; battles of several rounds in which the models' first answers differ keep
    only the part that both saw, so the completions are all turns from there on.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has the two sides and a winner."""
        return has(row, "conversation_a", "conversation_b", "winner") or has(row, "response_a", "response_b", "winner_model_a")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The battle in a row."""
        refuse_text(self.style)
        if row.get("conversation_a") is None:
            return _kaggle(row, provenance)
        label = row.get("winner")
        if not isinstance(label, str) or label not in ARENA:
            raise BadRow("wrong_label", f"winner is {label!r}; there is {', '.join(ARENA)}", field="winner")
        ours, theirs = (turns(row.get(name), name) for name in ("conversation_a", "conversation_b"))
        prompt, first, second = split_turns(ours, theirs)
        names = ("conversation_a", "conversation_a", "conversation_b")
        return chat_pair(prompt, first, second, provenance, names=names, judgement=Preference(ARENA[label]))


def _kaggle(row: Row, provenance: Provenance) -> Example:
    """``prompt``, ``response_a``, ``response_b`` hold JSON lists of the turns' texts; three columns hold 0 or 1."""
    wins = [str(row.get(name)) in {"1", "True", "true", "1.0"} for name in ("winner_model_a", "winner_model_b", "winner_tie")]
    if sum(wins) != 1:
        raise BadRow(
            "wrong_label", "exactly one of winner_model_a, winner_model_b and winner_tie must be 1", field="winner_model_a"
        )
    label: Label = ("first", "second", "tie")[wins.index(True)]
    texts = {name: _texts(row, name) for name in ("prompt", "response_a", "response_b")}
    if len({len(one) for one in texts.values()}) != 1:
        raise BadRow("wrong_type", "prompt, response_a and response_b hold different numbers of turns", field="prompt")
    sides = [
        tuple(message for question, answer in zip(texts["prompt"], texts[name], strict=True)
              for message in (Message("user", question), Message("assistant", answer)))
        for name in ("response_a", "response_b")
    ]  # fmt: skip
    prompt, first, second = split_turns(sides[0], sides[1])
    names = ("prompt", "response_a", "response_b")
    return chat_pair(prompt, first, second, provenance, names=names, judgement=Preference(label))


def _texts(row: Row, field: str) -> list[str]:
    text = text_field(row, field)
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [text]
    except ValueError:
        found = [text]
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise BadRow("wrong_type", f"{field} holds no list of texts", field=field)
    return found


@formats.register("pandalm")
@dataclass(frozen=True, slots=True)
class PandaLM:
    """Three annotators' votes (0 tie, 1 first, 2 second) on two responses; the majority decides, without one it is a tie.

    The confidence is the share that voted for the winner.
    """

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has instruction, two responses and votes."""
        return has(row, "instruction", "response1", "response2", "annotator1")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The comparison in a row."""
        refuse_text(self.style)
        names = sorted(key for key in row if isinstance(key, str) and key.startswith("annotator") and row[key] is not None)
        judgement = majority_of([self._vote(row, name) for name in names])
        sides = [assistant(text_field(row, name)) for name in ("response1", "response2")]
        where = Provenance(provenance.file, provenance.line, tuple(names))
        fields = ("instruction", "response1", "response2")
        return chat_pair(user(instruction_of(row)), sides[0], sides[1], where, names=fields, judgement=judgement)

    @staticmethod
    def _vote(row: Row, field: str) -> Label:
        value = row[field]
        number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
        if isinstance(number, bool) or not isinstance(number, int) or number not in PANDALM:
            raise BadRow("wrong_label", f"{field} is {value!r}, expected 0 (tie), 1 or 2", field=field)
        return PANDALM[number]


def majority_of(votes: Sequence[Label]) -> Preference:
    """The side with the most votes, and the share that it got as the confidence; a tie where two lead equally.

    >>> majority_of(["first", "first", "tie"])
    Preference(preferred='first', strength=0.0, confidence=0.6666666666666666)
    >>> majority_of(["first", "second"]).preferred
    'tie'
    """
    (winner, count), *others = Counter(votes).most_common()
    if others and others[0][1] == count:
        return Preference("tie")
    share = count / len(votes)
    return Preference(winner, 0.0, share if winner != "tie" and share > 0.5 and len(votes) > 1 else None)


@formats.register("orca-pairs")
@dataclass(frozen=True, slots=True)
class OrcaPairs:
    """Intel's Orca pairs: ``{system, question, chosen, rejected}``, texts; an empty system text gives no system turn."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has question, chosen and rejected."""
        return has(row, "question", "chosen", "rejected")

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        refuse_text(self.style)
        head: Messages = (Message("system", text_field(row, "system")),) if row.get("system") else ()
        chosen, rejected = (assistant(text_field(row, side)) for side in ("chosen", "rejected"))
        prompt = (*head, *user(text_field(row, "question")))
        return chat_pair(prompt, chosen, rejected, provenance, names=("question", "chosen", "rejected"))


@formats.register("aws-nova")
@dataclass(frozen=True, slots=True)
class AwsNova:
    """Amazon Nova's rows: a Bedrock conversation whose last turn has two candidates, ``preferred`` and ``non-preferred``."""

    style: Style | None = None

    def matches(self, row: Row) -> bool:
        """Has messages whose last one has candidates."""
        messages = row.get("messages")
        last = messages[-1] if isinstance(messages, (list, tuple)) and messages else None
        return isinstance(last, Mapping) and last.get("candidates") is not None

    def read(self, row: Row, provenance: Provenance) -> Example:
        """The pair in a row."""
        refuse_text(self.style)
        given = row["messages"]
        system = row.get("system") or []
        if not isinstance(system, (list, tuple)):
            raise BadRow("wrong_type", f"system is {kind_of(system)}, expected a list of texts", field="system")
        head: Messages = turns([{"role": "system", "content": list(system)}], "system") if system else ()
        field = f"messages.{len(given) - 1}.candidates"
        candidates = given[-1]["candidates"]
        if not isinstance(candidates, (list, tuple)) or len(candidates) != 2:
            raise BadRow("too_few_completions", f"{field} must hold two candidates", field=field)
        labels = [one.get("preferenceLabel") if isinstance(one, Mapping) else None for one in candidates]
        if sorted(map(str, labels)) != ["non-preferred", "preferred"]:
            raise BadRow("wrong_label", f"{field}: one must be preferred and one non-preferred, got {labels}", field=field)
        sides = [turns([{"role": "assistant", "content": _content(one)}], field) for one in candidates]
        judgement = Preference("first" if labels[0] == "preferred" else "second")
        prompt = (*head, *turns([_plain(one) for one in given[:-1]], "messages"))
        return chat_pair(prompt, sides[0], sides[1], provenance, names=("messages", field, field), judgement=judgement)


def _plain(turn: Any) -> Any:
    return {**turn, "content": _content(turn)} if isinstance(turn, Mapping) else turn


def _content(turn: Mapping[str, Any]) -> Any:
    """Bedrock writes ``[{text: ...}]``."""
    return turn.get("content")
