"""Near-duplicate texts by MinHash (Broder 1997) and banded locality-sensitive hashing, verified by Jaccard.

A text is the set of its character 5-grams: of word 5-grams a short prompt has hardly any, and one changed word takes
five of them away. 128 hash functions in 16 bands of 8 find a pair of similarity s with probability 1 - (1 - s^8)^16, which
is .95 at .8; each found pair is then measured.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

NUM_HASHES = 128
NUM_BANDS = 16
SHINGLE = 5
NEAR = 0.8
SHINGLES_AT_ONCE = 1 << 14
MAX_BUCKET = 64
"""In a larger bucket each text is compared with the first and the 64 before it, not with all."""

Hashes: TypeAlias = npt.NDArray[np.uint32]

_MIX = np.uint64(0x9E3779B97F4A7C15)
_generator = np.random.Generator(np.random.PCG64(20_000_000))
_FACTORS: Hashes = _generator.integers(0, 1 << 31, NUM_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_SHIFTS: Hashes = _generator.integers(0, 1 << 32, NUM_HASHES, dtype=np.uint32)


def normalise(text: str) -> str:
    """The form in which prompts are compared: NFKC, case folded, blanks collapsed.

    >>> normalise("  Ｈello\\n WORLD ")
    'hello world'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Hashes:
    """The set of a text's character 5-grams, as sorted hashes: (shingles,)."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    size = max(len(letters) - SHINGLE + 1, 1)
    total = np.zeros(size, np.uint64)
    for place in range(min(SHINGLE, len(letters))):
        total = (total + letters[place : place + size] + np.uint64(1)) * _MIX
        total ^= total >> np.uint64(29)
    return np.unique((total >> np.uint64(32)).astype(np.uint32))


def jaccard(ours: Hashes, theirs: Hashes) -> float:
    """Size of the intersection over that of the union, of two sorted sets."""
    both = len(np.intersect1d(ours, theirs, assume_unique=True))
    return both / (len(ours) + len(theirs) - both)


def near_pairs(texts: Sequence[str], threshold: float = NEAR) -> Iterator[tuple[int, int, float]]:
    """Pairs of places with a Jaccard similarity of at least ``threshold``, each once; texts must be normalised."""
    sets = [shingles(text) for text in texts]
    seen: set[tuple[int, int]] = set()
    for bucket in _buckets(_signatures(sets)):
        for at, second in enumerate(bucket):
            earlier = bucket[:at] if at <= MAX_BUCKET else [bucket[0], *bucket[at - MAX_BUCKET : at]]
            for first in earlier:
                if (first, second) in seen:
                    continue
                seen.add((first, second))
                similarity = jaccard(sets[first], sets[second])
                if similarity >= threshold:
                    yield first, second, similarity


def groups_of(texts: Sequence[str]) -> list[int]:
    """For each text the place of the first one of its group: equal after ``normalise``, or linked by near pairs."""
    normal = [normalise(text) for text in texts]
    first_place: dict[str, int] = {}
    for place, text in enumerate(normal):
        first_place.setdefault(text, place)
    unique = list(first_place)
    parent = list(range(len(unique)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second, _ in near_pairs(unique):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    roots = {text: first_place[unique[root(place)]] for place, text in enumerate(unique)}
    return [roots[text] for text in normal]


def _signatures(sets: Sequence[Hashes]) -> Hashes:
    """(texts, hashes): for each hash function the least value over a text's shingles."""
    signatures = np.empty((len(sets), NUM_HASHES), np.uint32)
    start = 0
    while start < len(sets):
        stop, total = start, 0
        while stop < len(sets) and (stop == start or total + len(sets[stop]) <= SHINGLES_AT_ONCE):
            total += len(sets[stop])
            stop += 1
        values = np.concatenate(sets[start:stop])
        begins = np.cumsum([0, *(len(one) for one in sets[start : stop - 1])])
        for number in range(NUM_HASHES):
            signatures[start:stop, number] = np.minimum.reduceat(values * _FACTORS[number] + _SHIFTS[number], begins)
        start = stop
    return signatures


def _buckets(signatures: Hashes) -> Iterator[list[int]]:
    """Places whose signatures agree in a whole band."""
    rows = NUM_HASHES // NUM_BANDS
    for band in range(NUM_BANDS):
        members: defaultdict[bytes, list[int]] = defaultdict(list)
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        for place in range(len(part)):
            members[part[place].tobytes()].append(place)
        yield from (bucket for bucket in members.values() if len(bucket) > 1)
