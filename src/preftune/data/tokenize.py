"""Examples to token ids: the prompt exactly as at inference, the completion behind it, and what of it is scored.

The rules: prompt ids are those of the rendered prompt alone, never of a merge with the completion. Only tokens that an
assistant wrote are scored, each turn's end token among them; what the template writes behind the last one is dropped.
A completion that is cut has no end token. At most one beginning token stands at the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from preftune.core.errors import BadRow, InputError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.ports import ChatTokenizer
from preftune.core.records import (
    Example,
    Excluded,
    Messages,
    Need,
    Preference,
    TokenisedCompletion,
    TokenisedExample,
    View,
    demonstration_of,
    pairs_of_example,
    unpaired_of,
)
from preftune.data.chat import AssistantTurn, RenderedCompletion, Tools, render_completion, render_prompt
from preftune.data.sources.base import excerpt_of

Offsets: TypeAlias = Sequence[tuple[int, int]]

EXAMPLES_BETWEEN_REPORTS = 500
ANCHORS = ("\n", ":", "a", "1")


@dataclass(frozen=True, slots=True)
class TokeniseResult:
    """Tokenised examples, those that were left out, and counts.

    ``counts``: ``kept``; each reason of ``excluded``; ``boundary_appended`` examples; ``cut`` completions;
    ``end_token_added`` completions whose template writes no token that ends a generation; ``confidence_not_read`` and
    ``strength_not_read`` pairs that say one, for a loss that does not read it.
    """

    examples: list[TokenisedExample]
    excluded: list[Excluded]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The completions of an example that become one group, and what is known of them."""

    completions: tuple[Messages, ...]
    strength: float = 0.0
    confidence: float | None = None
    is_tie: bool = False
    labels: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One completion before any cut."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    is_exact: bool
    is_end_added: bool


def tokenise(
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    *,
    view: View,
    max_length: int,
    too_long: Literal["exclude", "cut"],
    needs: frozenset[Need] = frozenset(),
    on_progress: EventSink = ignore,
) -> TokeniseResult:
    """Token ids of examples.

    Parameters
        view: ``pairs`` (preferences, and rankings as ``pairs_of_example`` says; completions ordered chosen, rejected),
            ``demonstrations`` (one completion) or ``unpaired`` (labelled completions behind one prompt, as ``unpaired_of``
            says).
        needs: of the loss; without ``ties`` a preference without a winner is left out.
        max_length: most tokens of prompt and one completion together.
        too_long: leave an example out that does not fit, or cut the end of its completions.

    Raises
        InputError: chat examples and a tokenizer without chat template.
    """
    kept: list[TokenisedExample] = []
    excluded: list[Excluded] = []
    counts: Counter[str] = Counter()
    for number, example in enumerate(examples):
        if number and number % EXAMPLES_BETWEEN_REPORTS == 0:
            on_progress(Progress("tokenising", number, len(examples)))
        where = example.provenance
        try:
            groups = [_tokenise_one(example, tokenizer, wanted) for wanted in _groups_of(example, view, needs)]
            fitted = [(_fit(tokens, max_length, too_long), num_added) for tokens, num_added in groups]
        except BadRow as bad:
            excerpt = excerpt_of(example.prompt_text)
            excluded.append(Excluded(where.file, where.line, bad.reason, bad.detail, bad.field, excerpt))
            counts[bad.reason] += 1
            continue
        for at, (one, num_added) in enumerate(fitted):
            kept.append(one if at == 0 else replace(one, example_id=f"{one.example_id}/{at}"))
            counts["kept"] += 1
            counts["boundary_appended"] += one.boundary == "appended"
            counts["cut"] += sum(completion.is_cut for completion in one.completions)
            counts["end_token_added"] += num_added
            if view == "pairs":
                counts["confidence_not_read"] += (one.confidence or 1.0) < 1 and "confidence" not in needs
                counts["strength_not_read"] += one.strength > 0 and "strength" not in needs
    return TokeniseResult(kept, excluded, {name: count for name, count in counts.items() if count})


def prompt_ids_of(
    prompt: Messages, tokenizer: ChatTokenizer, *, style: Literal["chat", "text"] = "chat", tools: Tools = ()
) -> tuple[int, ...]:
    """The ids that a model is given at inference, and that stand before every completion in training.

    Raises
        BadRow: ``template_error``, ``empty_prompt``, ``two_beginning_tokens``.
        InputError: a chat prompt and a tokenizer without chat template.
    """
    if style == "text":
        return _text_prompt(prompt[0].content, tokenizer)[0]
    return _chat_prompt(render_prompt(_with_template(tokenizer), prompt, tools), tokenizer)


def _groups_of(example: Example, view: View, needs: frozenset[Need]) -> list[_Wanted]:
    """The groups of completions of an example that a view takes, or ``BadRow`` where it has none."""
    if view == "demonstrations":
        demonstration = demonstration_of(example)
        if demonstration is None:
            raise BadRow("not_a_demonstration", "no completion that is said to be good")
        return [_Wanted((demonstration,))]
    judgement = example.judgement
    if isinstance(judgement, Preference) and judgement.preferred == "tie":
        if view == "pairs" and "ties" in needs:
            return [_Wanted(example.completions, confidence=judgement.confidence, is_tie=True)]
        raise BadRow("tie", "neither completion is better, and the loss takes no ties")
    if view == "pairs":
        pairs = pairs_of_example(example)
        if not pairs:
            raise BadRow("not_a_pair", "no preference for one of two completions")
        return [_Wanted((pair.chosen, pair.rejected), pair.strength, pair.confidence) for pair in pairs]
    labelled = unpaired_of(example)
    if not labelled:
        raise BadRow("not_labelled", "no completion is said to be desirable or undesirable")
    completions, labels = zip(*labelled, strict=True)
    return [_Wanted(completions, labels=labels)]


def _tokenise_one(example: Example, tokenizer: ChatTokenizer, wanted: _Wanted) -> tuple[TokenisedExample, int]:
    completions = wanted.completions
    if example.style == "text":
        prompt = example.prompt[0].content
        prompt_ids, num_head = _text_prompt(prompt, tokenizer)
        all_tokens = [_text_completion(prompt, prompt_ids, num_head, one[0].content, tokenizer) for one in completions]
    else:
        text = render_prompt(_with_template(tokenizer), example.prompt, example.tools)
        prompt_ids = _chat_prompt(text, tokenizer)
        all_tokens = [_chat_completion(example, text, prompt_ids, one, tokenizer) for one in completions]
    tokenised = TokenisedExample(
        example.id,
        prompt_ids,
        tuple(TokenisedCompletion(tokens.ids, tokens.scored) for tokens in all_tokens),
        "exact" if all(tokens.is_exact for tokens in all_tokens) else "appended",
        wanted.strength,
        wanted.confidence,
        example.provenance,
        wanted.is_tie,
        wanted.labels,
    )
    return tokenised, sum(tokens.is_end_added for tokens in all_tokens)


def _with_template(tokenizer: ChatTokenizer) -> ChatTokenizer:
    if not tokenizer.has_chat_template:
        raise InputError(
            "the model has no chat template, and the rows are conversations; set chat_template: chatml, plain or a file"
        )
    return tokenizer


def _chat_prompt(text: str, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return _checked_head(tuple(tokenizer.encode(text, add_special_tokens=False)), tokenizer)


def _checked_head(ids: tuple[int, ...], tokenizer: ChatTokenizer) -> tuple[int, ...]:
    if not ids:
        raise BadRow("empty_prompt", "the prompt has no token, so nothing predicts the completion's first one")
    if tokenizer.bos_id is not None and ids[:2] == (tokenizer.bos_id, tokenizer.bos_id):
        raise BadRow(
            "two_beginning_tokens", "the rendered prompt begins with two beginning tokens; one of them is the template's"
        )
    return ids


def _text_prompt(text: str, tokenizer: ChatTokenizer) -> tuple[tuple[int, ...], int]:
    """Ids of a raw prompt with the tokenizer's own beginning but not its end, and how many ids the beginning has."""
    bare = tokenizer.encode(text, add_special_tokens=False)
    full = tokenizer.encode(text, add_special_tokens=True)
    num_head = next((place for place in range(len(full) - len(bare) + 1) if full[place : place + len(bare)] == bare), 0)
    if bare and bare[0] == tokenizer.bos_id and num_head and full[num_head - 1] == tokenizer.bos_id:
        num_head, full = 0, bare  # the text brings its own beginning token
    return _checked_head(tuple(full[: num_head + len(bare)]), tokenizer), num_head


def _text_completion(
    prompt: str, prompt_ids: tuple[int, ...], num_head: int, completion: str, tokenizer: ChatTokenizer
) -> _Tokens:
    ids, _, is_exact = _encode_behind(prompt, prompt_ids[num_head:], completion, tokenizer)
    if not ids:
        raise BadRow("nothing_scored", "the completion has no token")
    if ids[-1] not in tokenizer.eos_ids:
        ids = [*ids, tokenizer.end_id]
    return _Tokens(tuple(ids), (True,) * len(ids), is_exact, is_end_added=False)


def _chat_completion(
    example: Example, prompt_text: str, prompt_ids: tuple[int, ...], completion: Messages, tokenizer: ChatTokenizer
) -> _Tokens:
    rendered = render_completion(tokenizer, prompt_text, example.prompt, completion, example.tools)
    ids, offsets, is_exact = _encode_behind(prompt_text, prompt_ids, rendered.text, tokenizer)
    is_exact = is_exact and rendered.form == "prefix"
    scored = [False] * len(ids)
    length = 0
    has_end = False
    for turn in rendered.turns:
        length, has_end = _turn_end(rendered, turn, ids, offsets, tokenizer.eos_ids)
        for place in range(length):
            scored[place] = scored[place] or turn.start <= offsets[place][0] < turn.limit
    ids, scored = ids[:length], scored[:length]
    if not has_end:
        ids, scored = [*ids, tokenizer.end_id], [*scored, True]
    return _Tokens(tuple(ids), tuple(scored), is_exact, is_end_added=not has_end)


def _turn_end(
    rendered: RenderedCompletion, turn: AssistantTurn, ids: Sequence[int], offsets: Offsets, eos_ids: frozenset[int]
) -> tuple[int, bool]:
    """Number of tokens up to the end of a turn, and whether its last one ends a generation.

    That is the first ending token behind the content: some templates write a second one at the end of the text. Where
    there is none, it is what the template writes behind the last answer, but for blanks.
    """
    for place, (start, _) in enumerate(offsets):
        if turn.content_end <= start < turn.limit and ids[place] in eos_ids:
            return place + 1, True
    last = rendered.turns[-1]
    closing = rendered.text[last.content_end :].rstrip()
    is_closed = rendered.text.startswith(closing, turn.content_end)
    end = turn.content_end + (len(closing) if is_closed else 0)
    return sum(start < end for start, _ in offsets), False


def _encode_behind(
    before: str, before_ids: tuple[int, ...], text: str, tokenizer: ChatTokenizer
) -> tuple[list[int], Offsets, bool]:
    """Ids of a text behind another one whose ids are given, their character spans, and whether the joint is exact.

    It is exact where encoding both in one go leaves the ids of the first as they are and no token reaches over the
    joint. (Equal ids are not enough: a tokenizer may fuse unknown characters of both into the one token of the first.)

    Raises
        BadRow: ``characters_lost`` where the tokenizer drops what it does not know, so that the spans are wrong.
    """
    whole = before + text
    ids, offsets = tokenizer.encode_with_offsets(whole, add_special_tokens=False)
    lost = _not_covered(whole, offsets)
    if lost:
        raise BadRow("characters_lost", f"the tokenizer drops characters that it does not know, near {excerpt_of(lost)[:40]!r}")
    size, joint = len(before_ids), len(before)
    if tuple(ids[:size]) == before_ids and all(end <= joint for _, end in offsets[max(size - 1, 0) : size]):
        return ids[size:], [(start - joint, end - joint) for start, end in offsets[size:]], True
    return *_encode_apart(text, tokenizer), False


def _not_covered(text: str, offsets: Offsets) -> str:
    """The first part of a text, blanks aside, that lies in no token."""
    reached = 0
    for start, end in (*offsets, (len(text), len(text))):
        if start > reached and text[reached:start].strip():
            return text[reached:start]
        reached = max(reached, end)
    return ""


def _encode_apart(text: str, tokenizer: ChatTokenizer) -> tuple[list[int], Offsets]:
    """Ids of a text as they are inside a longer one: without the blank that some tokenizers put before the first word.

    The text is encoded behind a short anchor, and the anchor's ids are taken off where they end at its end.
    """
    for anchor in ANCHORS:
        head = tokenizer.encode(anchor, add_special_tokens=False)
        ids, offsets = tokenizer.encode_with_offsets(anchor + text, add_special_tokens=False)
        size = len(head)
        if (
            ids[:size] == head
            and offsets[size - 1][1] <= len(anchor)
            and all(start >= len(anchor) for start, _ in offsets[size:])
        ):
            return ids[size:], [(start - len(anchor), end - len(anchor)) for start, end in offsets[size:]]
    return tokenizer.encode_with_offsets(text, add_special_tokens=False)


def _fit(example: TokenisedExample, max_length: int, too_long: Literal["exclude", "cut"]) -> TokenisedExample:
    """The example within the limit, or ``BadRow``."""
    prompt = len(example.prompt_ids)
    room = max_length - prompt
    lengths = [len(completion.ids) for completion in example.completions]
    longest = max(lengths)
    if longest > room:
        if room <= 0:
            raise BadRow("prompt_too_long", f"the prompt has {prompt} tokens, the limit is {max_length}")
        if too_long == "exclude":
            detail = f"prompt {prompt} + completion {' and '.join(map(str, lengths))} tokens, the limit is {max_length}"
            raise BadRow("too_long", detail)
    completions = tuple(
        TokenisedCompletion(one.ids[:room], one.scored[:room], is_cut=True) if len(one.ids) > room else one
        for one in example.completions
    )
    for completion in completions:
        if not any(completion.scored):
            raise BadRow("nothing_scored", "no token of the completion was written by an assistant")
    if len(completions) == 2 and completions[0].ids == completions[1].ids:
        if any(completion.is_cut for completion in completions):
            raise BadRow("identical_after_cut", f"chosen and rejected begin with the same {room} tokens, which are all that fit")
        raise BadRow("identical_tokens", "chosen and rejected have the same tokens")
    return replace(example, completions=completions)
