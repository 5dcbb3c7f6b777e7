"""Pairs that say nearly the opposite of each other: nearly the same prompt and completions, preferred the other way round.

Exact contradictions are left out where rows are read (``data.pipeline``); these stay in, because near is not equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from preftune.core.records import Example, PreferencePair, Provenance, pair_of, text_of
from preftune.data.minhash import NEAR, Hashes, groups_of, jaccard, normalise, shingles

MAX_GROUP = 64
"""Of more pairs with one prompt, the first so many are compared."""
MAX_NEAR_PROMPTS = 50_000
"""Above so many rows only prompts that are equal (but for case, width and blanks) are grouped."""


@dataclass(frozen=True, slots=True)
class NearContradiction:
    """Two rows that disagree, and how alike their completions are, crosswise (Jaccard of character 5-grams)."""

    first: Provenance
    second: Provenance
    similarity: float


def near_contradictions(examples: Sequence[Example]) -> list[NearContradiction]:
    """Pairs of rows whose chosen is nearly the other's rejected, both ways, and less like the other's chosen.

    The last condition keeps two pairs apart that agree and whose sides differ by a word.
    """
    groups: defaultdict[object, list[tuple[Provenance, Hashes, Hashes]]] = defaultdict(list)
    for key, members in _by_prompt(examples).items():
        if len(members) > 1:
            groups[key] = [
                (one.provenance, _shingles(pair, "chosen"), _shingles(pair, "rejected")) for one, pair in members[:MAX_GROUP]
            ]
    found: list[NearContradiction] = []
    for rows in groups.values():
        for (where, chosen, rejected), (other, their_chosen, their_rejected) in combinations(rows, 2):
            crosswise = min(jaccard(chosen, their_rejected), jaccard(rejected, their_chosen))
            if crosswise >= NEAR and crosswise > min(jaccard(chosen, their_chosen), jaccard(rejected, their_rejected)):
                found.append(NearContradiction(where, other, crosswise))
    return found


def near_contradiction_facts(examples: Sequence[Example]) -> dict[str, object]:
    """How many there are and where the first is, for a report; empty where there is none."""
    found = near_contradictions(examples)
    if not found:
        return {}
    first, second = found[0].first, found[0].second
    return {"rows": len(found), "first": f"{first.file}:{first.line} and {second.file}:{second.line}"}


def _by_prompt(examples: Sequence[Example]) -> dict[object, list[tuple[Example, PreferencePair]]]:
    pairs = [(example, pair) for example in examples if (pair := pair_of(example)) is not None]
    texts = [example.prompt_text for example, _ in pairs]
    keys = groups_of(texts) if len(texts) <= MAX_NEAR_PROMPTS else [normalise(text) for text in texts]
    grouped: defaultdict[object, list[tuple[Example, PreferencePair]]] = defaultdict(list)
    for key, member in zip(keys, pairs, strict=True):
        grouped[key].append(member)
    return grouped


def _shingles(pair: PreferencePair, side: str) -> Hashes:
    return shingles(normalise(text_of(pair.chosen if side == "chosen" else pair.rejected)))
