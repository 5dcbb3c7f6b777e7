"""Train and held-out parts by prompt, never by row; and prompts that both have nevertheless."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from preftune.core.ids import digest_bytes
from preftune.core.records import Example
from preftune.data.minhash import groups_of, near_pairs, normalise


@dataclass(frozen=True, slots=True)
class Leak:
    """A held-out prompt that is also a training prompt, exactly (but for case, width and blanks) or nearly.

    ``heldout`` and ``train`` are places in the two lists; ``similarity`` is the Jaccard similarity of their shingles.
    """

    heldout: int
    train: int
    kind: Literal["exact", "near"]
    similarity: float


def split_by_prompt(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, in their order; all examples of near-duplicate prompts are on one side.

    Which groups are held out depends on the seed and on their own text only, not on the order of rows. Groups are
    taken while they fit into ``share``; at least one is, where there are two or more.

    Parameters
        share: part of the examples to hold out, 0 to 1.
    """
    if share <= 0:
        return list(examples), []
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for place, group in enumerate(groups_of([example.prompt_text for example in examples])):
        groups[group].append(place)

    def rank(places: list[int]) -> str:
        key = min(normalise(examples[place].prompt_text) for place in places)
        return digest_bytes(str(seed).encode(), key.encode("utf-8", "surrogatepass"))

    wanted = round(share * len(examples))
    ranked = sorted(groups.values(), key=rank)
    heldout: set[int] = set()
    for places in ranked:
        if len(heldout) + len(places) <= wanted:
            heldout.update(places)
    if not heldout and len(ranked) > 1:
        smallest = min(ranked, key=len)
        heldout.update(smallest)
    train = [example for place, example in enumerate(examples) if place not in heldout]
    return train, [examples[place] for place in sorted(heldout)]


def leaks(train_prompts: Sequence[str], heldout_prompts: Sequence[str]) -> list[Leak]:
    """For each held-out prompt that leaks, the nearest training prompt: equal ones first, then by similarity."""
    known: dict[str, int] = {}
    for place, prompt in enumerate(train_prompts):
        known.setdefault(normalise(prompt), place)
    found: dict[int, Leak] = {}
    heldout: defaultdict[str, list[int]] = defaultdict(list)
    for place, prompt in enumerate(heldout_prompts):
        text = normalise(prompt)
        if text in known:
            found[place] = Leak(place, known[text], "exact", 1.0)
        else:
            heldout[text].append(place)
    ours, theirs = list(known), list(heldout)
    for first, second, similarity in near_pairs([*ours, *theirs]):
        if first < len(ours) <= second:
            for place in heldout[theirs[second - len(ours)]]:
                if place not in found or similarity > found[place].similarity:
                    found[place] = Leak(place, known[ours[first]], "near", similarity)
    return [found[place] for place in sorted(found)]
