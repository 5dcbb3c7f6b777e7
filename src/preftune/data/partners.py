"""Mismatched partners: behind each prompt a completion of another one, for losses that estimate a divergence with them.

Who is whose partner follows from the content of the set alone. Prompts stand in the order of their digests, round in a
circle; each example takes its partner from the next prompt. So neither the order of training, nor its batch size, nor
the seed changes anything, and the reference scores every partner once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from preftune.core.errors import InputError
from preftune.core.ids import digest_json
from preftune.core.records import TokenisedCompletion, TokenisedExample


def with_partners(
    examples: Sequence[TokenisedExample], max_length: int, others: Sequence[TokenisedExample] = ()
) -> list[TokenisedExample]:
    """The examples in their order, each with its partner.

    The examples of a prompt take the completions of the next prompt in turn. A partner that would not fit behind the
    prompt is cut, and then has no end token.

    Parameters
        max_length: most tokens of a prompt and its partner together.
        others: take part where the examples alone have one prompt only, such as the training set for a small held-out one.

    Raises
        InputError: fewer than two prompts in all.
    """
    if not examples:
        return []
    if len({example.prompt_ids for example in examples}) < 2 and others:
        return with_partners([*examples, *others], max_length)[: len(examples)]
    members: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for place, example in enumerate(examples):
        content = [[list(one.ids), list(one.scored)] for one in example.completions]
        members[digest_json(list(example.prompt_ids))].append((digest_json(content), place))
    if len(members) < 2:
        raise InputError(
            f"all {len(examples)} examples have one prompt, and this loss compares each prompt with a completion of another "
            "one; add examples of other prompts"
        )
    circle = [[examples[place] for _, place in sorted(members[key])] for key in sorted(members)]
    places = [[place for _, place in sorted(members[key])] for key in sorted(members)]
    found = list(examples)
    for at, (group, own) in enumerate(zip(circle, places, strict=True)):
        for turn, (example, place) in enumerate(zip(group, own, strict=True)):
            room = max_length - len(example.prompt_ids)
            found[place] = replace(example, partner=_partner(circle, at, turn, room))
    return found


def partner_group(example: TokenisedExample) -> TokenisedExample:
    """The group of a prompt and its partner alone, as it is scored; ValueError where the example has none."""
    if example.partner is None:
        raise ValueError(f"example {example.example_id} has no partner: give the set its partners first")
    return replace(example, completions=(example.partner,), labels=(), partner=None)


def _partner(circle: Sequence[Sequence[TokenisedExample]], at: int, turn: int, room: int) -> TokenisedCompletion:
    """The first completion after this prompt that has a scored token within the room."""
    for step in range(1, len(circle)):
        offered = [completion for example in circle[(at + step) % len(circle)] for completion in example.completions]
        for shift in range(len(offered)):
            one = offered[(turn + shift) % len(offered)]
            if any(one.scored[:room]):
                return one if len(one.ids) <= room else TokenisedCompletion(one.ids[:room], one.scored[:room], is_cut=True)
    raise InputError("no completion of another prompt has a scored token within the length limit; raise data.max_length")
