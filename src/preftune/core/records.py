"""The record: a prompt, K completions and one judgement; and the tokenised forms that follow from it.

Nothing here is positional: which completion is better is said by the judgement, never by its place. Records are
frozen dataclasses with slots, not pydantic models: a million of them pass through the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, TypeAlias

from preftune.core.ids import digest_json

Role = Literal["system", "user", "assistant", "tool"]
View: TypeAlias = Literal["pairs", "unpaired", "demonstrations"]  # what a loss is given
# and what else it reads
Need: TypeAlias = Literal["tokens", "concentration", "prompt", "ties", "mismatched", "confidence", "strength"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``content`` is text; the other fields are passed to the chat template as they came."""

    role: Role
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The mapping that chat templates and JSON files take; empty fields are left out."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [dict(call) for call in self.tool_calls]
        for key in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, key)
            if value is not None:
                row[key] = value
        return row


Messages: TypeAlias = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The first completion is one to imitate (SFT)."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Which of two completions is better.

    Parameters
        preferred: ``first``, ``second`` or ``tie``, of the two completions in their stored order.
        strength: 0 to 3, how much better (0 = not said).
        confidence: probability in (0.5, 1] that the label is right, or None where not said.
    """

    preferred: Literal["first", "second", "tie"]
    strength: float = 0.0
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Desirability:
    """One completion that is desirable or not (KTO)."""

    is_desirable: bool


@dataclass(frozen=True, slots=True)
class Ranking:
    """Rank of each completion, 1 = best; equal ranks are ties."""

    ranks: tuple[int, ...]


Judgement: TypeAlias = Demonstration | Preference | Desirability | Ranking


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an example comes from: the file and its line (1-based; the row number in columnar files)."""

    file: str
    line: int
    annotators: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, its completions and one judgement.

    Parameters
        prompt: the turns before the completion. For ``style="text"`` one user message that holds raw text.
        completions: one per alternative, each a tuple of messages (several in agentic rows; only assistant turns score).
        judgement: what is known about them.
        style: ``chat`` rows pass through the chat template; ``text`` rows are raw text, prompt + completion.
        tools: tool schemas, passed to the chat template.
    """

    prompt: Messages
    completions: tuple[Messages, ...]
    judgement: Judgement
    provenance: Provenance
    style: Literal["chat", "text"] = "chat"
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """Content hash of prompt, completions and judgement; provenance does not count."""
        return digest_json(
            [
                [m.to_dict() for m in self.prompt],
                [[m.to_dict() for m in completion] for completion in self.completions],
                [type(self.judgement).__name__, repr(self.judgement)],
                self.style,
                [dict(tool) for tool in self.tools],
            ]
        )

    @property
    def prompt_text(self) -> str:
        """The prompt as plain text for search, grouping and display: contents joined by newlines."""
        return "\n".join(message.content for message in self.prompt)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """The ordered view of an example with a decisive preference: what pairwise losses take."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    strength: float = 0.0
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class TokenisedCompletion:
    """Token ids of one completion and which of them count.

    Parameters
        ids: token ids that follow the prompt's, the end token included unless the completion was cut.
        scored: one flag per id: True on tokens that an assistant wrote (end tokens included).
        is_cut: the completion was shortened to fit; then it has no end token.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    is_cut: bool = False

    @property
    def num_scored(self) -> int:
        """Number of tokens that count."""
        return sum(self.scored)


@dataclass(frozen=True, slots=True)
class TokenisedExample:
    """One prompt with K completions as token ids: a group of a pack.

    ``completions`` are ordered by role: chosen, rejected for pairs; a single one for demonstrations; the desirable one
    first for unpaired ones. ``boundary`` says how the completion was joined to the prompt: ``exact`` (the template
    renders prompt + completion with the generation prompt as prefix) or ``appended`` (content and turn end were put
    behind the generation prompt).

    Parameters
        is_tie: neither completion is better; then they stand in the order of the data.
        labels: whether each completion is desirable, for unpaired losses; else empty.
        partner: a completion of another prompt, scored behind this one by losses that estimate a divergence with it;
            it is no member of the group and never has a gradient.
    """

    example_id: str
    prompt_ids: tuple[int, ...]
    completions: tuple[TokenisedCompletion, ...]
    boundary: Literal["exact", "appended"] = "exact"
    strength: float = 0.0
    confidence: float | None = None
    provenance: Provenance = field(default=Provenance("", 0))
    is_tie: bool = False
    labels: tuple[bool, ...] = ()
    partner: TokenisedCompletion | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the shared layout: the prompt once, each completion once."""
        return len(self.prompt_ids) + sum(len(completion.ids) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that was left out, with the reason that is counted and the sentence that is shown."""

    file: str
    line: int
    reason: str
    detail: str
    field: str | None = None
    excerpt: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row of ``excluded.jsonl``."""
        return {
            "file": self.file,
            "line": self.line,
            "reason": self.reason,
            "detail": self.detail,
            "field": self.field,
            "excerpt": self.excerpt,
        }


def pair_of(example: Example) -> PreferencePair | None:
    """The ordered pair of an example with a decisive preference over two completions; None for every other one.

    >>> p, a, b = (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)
    >>> pair_of(Example(p, (a, b), Preference("second"), Provenance("f", 1))).chosen[0].content
    'b'
    """
    judgement = example.judgement
    if not isinstance(judgement, Preference) or judgement.preferred == "tie" or len(example.completions) != 2:
        return None
    first, second = example.completions
    chosen, rejected = (first, second) if judgement.preferred == "first" else (second, first)
    return PreferencePair(example.prompt, chosen, rejected, judgement.strength, judgement.confidence)


def pairs_of_example(example: Example) -> tuple[PreferencePair, ...]:
    """The pairs that an example gives: its own, or of a ranking the best completion against the worst.

    Where several share the best or the worst rank, the first of them stands for all; a ranking without a difference gives
    no pair, and neither does anything else.

    >>> p, *answers = (Message("user", "q"),), *((Message("assistant", text),) for text in "abc")
    >>> pair, = pairs_of_example(Example(p, tuple(answers), Ranking((2, 3, 1)), Provenance("f", 1)))
    >>> pair.chosen[0].content, pair.rejected[0].content
    ('c', 'b')
    """
    judgement = example.judgement
    if isinstance(judgement, Ranking):
        best, worst = min(judgement.ranks), max(judgement.ranks)
        if best == worst:
            return ()
        chosen, rejected = (example.completions[judgement.ranks.index(rank)] for rank in (best, worst))
        return (PreferencePair(example.prompt, chosen, rejected),)
    pair = pair_of(example)
    return () if pair is None else (pair,)


def expand_ranking(example: Example, rule: str) -> list[Example]:
    """The comparisons that a ranking stands for, as examples of their own; any other example as it is.

    Parameters
        rule: ``all`` pairs of different rank; ``adjacent``, each with those of the next rank; ``best_worst`` leaves the
            ranking as it is, because ``pairs_of_example`` takes the best and the worst of it.

    >>> p, *answers = (Message("user", "q"),), *((Message("assistant", text),) for text in "abc")
    >>> ranking = Example(p, tuple(answers), Ranking((1, 2, 3)), Provenance("f", 1))
    >>> [len(expand_ranking(ranking, rule)) for rule in ("best_worst", "adjacent", "all")]
    [1, 2, 3]
    """
    judgement = example.judgement
    if rule == "best_worst" or not isinstance(judgement, Ranking):
        return [example]
    distinct = sorted(set(judgement.ranks))
    found = []
    for (one, rank), (other, worse) in combinations(sorted(enumerate(judgement.ranks), key=lambda both: both[1]), 2):
        if rank < worse and (rule == "all" or distinct.index(worse) == distinct.index(rank) + 1):
            completions = (example.completions[one], example.completions[other])
            found.append(replace(example, completions=completions, judgement=Preference("first")))
    return found


def unpaired_of(example: Example) -> tuple[tuple[Messages, bool], ...]:
    """Completions with whether they are desirable: the label itself, or of each pair the chosen one and not the rejected one.

    >>> p, a, b = (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)
    >>> found = unpaired_of(Example(p, (a, b), Preference("second"), Provenance("f", 1)))
    >>> [(completion[0].content, label) for completion, label in found]
    [('b', True), ('a', False)]
    """
    if isinstance(example.judgement, Desirability):
        return ((example.completions[0], example.judgement.is_desirable),)
    pairs = pairs_of_example(example)
    found = [(completion, label) for pair in pairs for completion, label in ((pair.chosen, True), (pair.rejected, False))]
    # By equality, not by hash: messages with tool calls hold mappings, which have none.
    return tuple(one for place, one in enumerate(found) if one not in found[:place])


def demonstration_of(example: Example) -> Messages | None:
    """The completion that SFT imitates: the demonstration itself, the chosen one of a pair, the desirable one."""
    judgement = example.judgement
    if isinstance(judgement, Demonstration) or (isinstance(judgement, Desirability) and judgement.is_desirable):
        return example.completions[0]
    if isinstance(judgement, Ranking):
        best = min(judgement.ranks)
        return example.completions[judgement.ranks.index(best)] if judgement.ranks.count(best) == 1 else None
    pair = pair_of(example)
    return None if pair is None else pair.chosen


def text_of(messages: Sequence[Message]) -> str:
    """What a judge or a reader sees of a completion: the contents of its assistant turns."""
    return "\n".join(message.content for message in messages if message.role == "assistant")
