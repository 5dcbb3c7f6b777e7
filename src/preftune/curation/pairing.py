"""From scored samples of one prompt to pairs: a stated rule proposes, guards refuse, every refusal has a reason."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from preftune.core.recipe import GenerateConfig

REASONS = {
    "empty": "a sample has no text",
    "no_difference": "the judge sees no difference, or less than guards.min_margin",
    "identical": "both completions have the same text",
    "incomplete_chosen": "the chosen completion did not end by itself",
    "length_ratio": "one completion is too long for the other (guards.max_length_ratio)",
    "duplicate_prompt": "the prompt was used before",
    "in_verdict_set": "the prompt belongs to the verdict set",
    "no_room": "the prompt leaves the model no position for an answer",
    "no_verdict": "the judge gave no verdict on a prompt's samples",
    "no_pair": "no pair of a prompt was kept",
}
"""Every reason for leaving something out, in words; counted in samples, proposed pairs or prompts, as the words say."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample with its score.

    number: of the sample, from 0. score: higher is better; its unit is the judge's.
    """

    number: int
    text: str
    is_complete: bool
    score: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one prompt; the chosen one has the higher score."""

    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        """Difference of the scores."""
        return self.chosen.score - self.rejected.score


def pair_up(
    samples: Sequence[Scored], config: GenerateConfig, seed: int, tie_margin: float = 0.0
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of one prompt, and how many samples and proposals were refused for each reason.

    ``best_worst`` and ``best_random`` take the first proposal that passes; ``all`` and ``threshold`` take every one.

    Parameters
        seed: of ``best_random``; of the prompt, so that pairs do not depend on other prompts.
        tie_margin: differences below it are ties of the judge itself.

    >>> from preftune.core.recipe import GuardsConfig
    >>> asked = GenerateConfig(prompts="p", judge="j", guards=GuardsConfig(max_length_ratio=None))
    >>> texts = [Scored(0, "good", True, 2.0), Scored(1, "bad", True, -1.0), Scored(2, "best", False, 3.0)]
    >>> pairs, refused = pair_up(texts, asked, seed=0)
    >>> (pairs[0].chosen.text, pairs[0].rejected.text, dict(refused))
    ('good', 'bad', {'incomplete_chosen': 1})
    """
    refused: Counter[str] = Counter()
    usable = [sample for sample in samples if sample.text.strip()]
    if len(usable) < len(samples):
        refused["empty"] = len(samples) - len(usable)
    kept: list[Pair] = []
    for pair in propose(usable, config, seed):
        reason = why_not(pair, config, tie_margin)
        if reason is not None:
            refused[reason] += 1
            continue
        kept.append(pair)
        if config.pairing in {"best_worst", "best_random"}:
            break
    return kept, refused


def propose(samples: Sequence[Scored], config: GenerateConfig, seed: int) -> Iterator[Pair]:
    """Pairs in the order in which the rule wants them; samples of equal score in the order of their numbers.

    The order of the list does not matter.
    """
    ranked = sorted(samples, key=lambda sample: (-sample.score, sample.number))
    pairs = [Pair(chosen, rejected) for chosen, rejected in itertools.combinations(ranked, 2)]
    if config.pairing == "best_random":
        order = np.random.default_rng(seed).permutation(len(ranked))
        place = {ranked[int(index)].number: at for at, index in enumerate(order)}
        rank = {sample.number: at for at, sample in enumerate(ranked)}
        pairs.sort(key=lambda pair: (rank[pair.chosen.number], place[pair.rejected.number]))
    else:
        pairs.sort(key=lambda pair: (-pair.margin, pair.chosen.number, pair.rejected.number))
    least = config.threshold if config.threshold is not None else 0.0
    yield from (pair for pair in pairs if pair.margin >= least)


def why_not(pair: Pair, config: GenerateConfig, tie_margin: float = 0.0) -> str | None:
    """The first reason against a pair, a key of ``REASONS``; None where every guard lets it pass."""
    guards = config.guards
    if pair.chosen.text == pair.rejected.text:
        return "identical"
    if pair.margin <= 0 or pair.margin < max(guards.min_margin, tie_margin):
        return "no_difference"
    if guards.require_complete and not pair.chosen.is_complete:
        return "incomplete_chosen"
    if guards.max_length_ratio is not None and length_ratio(pair) > guards.max_length_ratio:
        return "length_ratio"
    return None


def length_ratio(pair: Pair) -> float:
    """Characters of the longer completion over those of the shorter one."""
    short, long = sorted((len(pair.chosen.text), len(pair.rejected.text)))
    return long / short
