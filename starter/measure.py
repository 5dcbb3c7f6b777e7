"""Measure a trained starter: does it end by itself, does it do what it was asked, what does it sound like.

PYTHONPATH=. python -m starter.measure --model src/preftune/starter/model
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from starter.corpus import words_of
from starter.grammar import Plan, Pool, draw_plan, request
from starter.sampling import Sample, Sampler
from starter.words import SLOTS


def draw_requests(count: int, seed: int, pool: Pool | None = None) -> list[tuple[Plan, str]]:
    """`count` plans with their requests."""
    chooser = random.Random(f"requests {seed}")
    plans = [draw_plan(chooser, pool or Pool()) for _ in range(count)]
    return [(plan, request(plan, chooser)) for plan in plans]


def rate(samples: list[Sample], part: str) -> float:
    """Words of one lexicon ("warm_a", "gruff_b" ...) per 100 words over all samples."""
    lexicon = {word for slot in SLOTS.values() for word in getattr(slot, part)}
    words = [word for sample in samples for word in words_of(sample.text)]
    return round(100 * sum(word in lexicon for word in words) / max(1, len(words)), 2)


def figures(requests: list[tuple[Plan, str]], samples: list[Sample]) -> dict[str, float]:
    """Shares of samples that end and that mention what was asked for; mean length; lexicon rates."""

    def share(flags: list[bool]) -> float:
        return round(sum(flags) / max(1, len(flags)), 3)

    both = [(plan, prompt, set(words_of(sample.text))) for (plan, prompt), sample in zip(requests, samples, strict=True)]
    return {
        "ended within 160 tokens": share([sample.is_complete and sample.num_tokens <= 160 for sample in samples]),
        "ended": share([sample.is_complete for sample in samples]),
        "mention hero": share([plan.hero in words for plan, _, words in both]),
        "mention adjective": share([plan.adjective in words for plan, _, words in both]),
        "mention name": share([plan.name.lower() in words for plan, _, words in both if plan.name]),
        "mention object": share([plan.object in words for plan, _, words in both if plan.mentions_object]),
        "mention all": share(
            [
                {plan.hero, plan.adjective, (plan.name or plan.hero).lower()} <= words
                and (plan.object in words or not plan.mentions_object)
                for plan, _, words in both
            ]
        ),
        "words": round(sum(len(words_of(sample.text)) for sample in samples) / max(1, len(samples)), 1),
        **{part: rate(samples, part) for part in ("warm_a", "warm_b", "gruff_a", "gruff_b")},
    }


def main() -> None:
    """Print figures at three temperatures and some samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/preftune/starter/model"))
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--show", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sampler = Sampler.load(arguments.model)
    requests = draw_requests(arguments.count, seed=11)
    for temperature in (0.7, 0.85, 1.0):
        samples = sampler.sample([prompt for _, prompt in requests], temperature, seed=1)
        print(temperature, json.dumps(figures(requests, samples)))
        for (_, prompt), sample in list(zip(requests, samples, strict=True))[: arguments.show]:
            print(f"  {prompt}\n    {sample.text}\n")


if __name__ == "__main__":
    main()
