"""A whole report, as a demo makes one, and the hostile texts that a model can write."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from preftune.core.records import Excluded, Message, Messages
from preftune.evaluation.heldout import PairScores, held_out_accuracy
from preftune.evaluation.report import Report, StageReport, samples_of
from preftune.evaluation.winrate import evaluate_pairs
from preftune.judging.base import Candidate
from preftune.judging.rules import RulesJudge

HOSTILE = (
    "<script>alert('x')</script><img src=x onerror=alert(1)> </div></main> <!-- &amp; {{ 7*7 }} ${x} ]]> "
    "nul \x00 escape \x1b[31m lone \ud800 bidi \u202e evil \u2066 "
    "עברית and العربية "
    "`````` | pipes | # heading http://example.org/x.png " + "w" * 900
)

_NAMES = ("Tim", "Mia", "Ben", "Lily", "Sam", "Anna")
_ANIMALS = ("puppy", "bird", "fox", "kitten", "rabbit", "bear")
_KIND = ("gave a gentle hug", "said thank you", "helped the little one", "shared the happy cake")
_PLAIN = ("went to the park", "saw a big tree", "ran home fast", "found a red ball", "was angry and mean")


def judge(*words: str, title: str) -> RulesJudge:
    return RulesJudge(
        (
            {"kind": "lexicon", "name": "warm", "words": list(words), "weight": 1.0, "cap": 8},
            {"kind": "complete", "weight": 2.0},
            {"kind": "repetition", "weight": -4.0},
            {"kind": "mentions", "weight": 1.0},
        ),
        tie_margin=0.5,
        title=title,
    )


def story(rng: np.random.Generator, name: str, animal: str, warmth: float) -> Candidate:
    parts = [f"Once there was a {animal} named {name}."]
    for _ in range(rng.integers(5, 12)):
        pool = _KIND if rng.random() < warmth else _PLAIN
        parts.append(f"{rng.choice([name, 'The ' + animal, 'Mom', 'A friend'])} {rng.choice(pool)}.")
    text = " ".join(parts)
    return Candidate(text, len(text.split()) + 1, bool(rng.random() < 0.95))


def rows(steps: int, seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    found: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        gain = 2.4 * (1 - math.exp(-step / 25)) if step > 1 else 0.0
        margin = gain + rng.normal(0, 0.25) * (step > 1)
        found.append(
            {
                "step": step,
                "loss": math.log1p(math.exp(-margin)),
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, max(0.4, 0.5 + 0.2 * gain + rng.normal(0, 0.06))),
                "logps/chosen": -120 - gain * 3 + rng.normal(0, 5),
                "logps/rejected": -118 - gain * 14 + rng.normal(0, 5),
                "learning_rate": 2e-4 * (1 - step / steps),
                "pairs_per_second": 41.0,
            }
        )
        if step % (steps // 4) == 0:
            found.append(
                {
                    "step": step,
                    "eval_loss": math.log1p(math.exp(-0.8 * gain)),
                    "eval_rewards/margins": 0.8 * gain,
                    "eval_rewards/accuracies": 0.5 + 0.17 * gain,
                    "eval_logps/chosen": -121 - gain * 3,
                    "eval_logps/rejected": -119 - gain * 11,
                }
            )
    return found


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    def build(
        *, warmth: float = 0.45, baseline_warmth: float = 0.15, hostile: str = "", count: int = 200, losses: int = 2
    ) -> Report:
        rng = np.random.default_rng(3)
        verdict = judge("gentle", "thank", "happy", title="warm tone, word list B")
        of_pairs = judge("hug", "helped", "shared", title="warm tone, word list A")
        prompts: list[Messages] = []
        policy, baseline = [], []
        for index in range(count):
            name, animal = str(rng.choice(_NAMES)), str(rng.choice(_ANIMALS))
            prompts.append((Message("user", f"Write a story about a {animal} named {name}, number {index}.{hostile}"),))
            policy.append(story(rng, name, animal, warmth))
            baseline.append(story(rng, name, animal, baseline_warmth))
        if hostile:
            policy = [Candidate(one.text + hostile, one.num_tokens, one.is_complete) for one in policy]
        win_rate = evaluate_pairs(prompts, policy, baseline, verdict)
        chosen = rng.normal(-4, 3, 61)
        held_out = held_out_accuracy(
            PairScores(
                chosen - 120, chosen - 125, [-124.0] * 61, [-124.0] * 61,
                rng.integers(60, 140, 61).tolist(), rng.integers(60, 140, 61).tolist(), [f"p{i}" for i in range(61)],
            ),
            beta=0.1,
        )  # fmt: skip
        return Report(
            run="demo-20260101-120000-ab12" + hostile,
            created="2026-01-01T12:05:00+00:00",
            win_rate=win_rate,
            baseline="the SFT model" + hostile,
            pairs_win_rate=evaluate_pairs(prompts, policy, baseline, of_pairs),
            held_out=held_out,
            stages=(
                StageReport(
                    "sft",
                    "sft",
                    {"adapter": "full", "lr": 3e-4, "steps": 24},
                    [{"step": i, "loss": 2.1 - 0.02 * i} for i in range(1, 25)],
                ),
                StageReport(
                    "dpo", "dpo", {"adapter": "full", "beta": 0.1, "lr": 2e-4, "steps": 100, "pairs per step": 16}, rows(100)
                ),
            ),
            counts={"sft": {"read": 400, "used": 398}, "dpo": {"read": 612, "used": 609, "held out": 61}},
            excluded=[Excluded("pairs.jsonl", 14, "identical", "both completions are the same text" + hostile)] * 3,
            samples=samples_of(win_rate, verdict, losses=losses),
            configuration=f"name: demo{hostile}\nmodel: starter\nseed: 7\n",
            environment={"preftune": "0.1.0", "torch": "2.13.0", "python": "3.11.9", "machine": "2 cores, 8 GB"},
            seeds={"recipe": 7, "bootstrap": 0},
            digests={"recipe": "f3856c7ba1cfb36bc618a5ca707d7eec", "reference": "2ca45d960dffadecb7e24b80c76ff308"},
            timings={"train sft": 61.2, "train dpo": 118.0, "generate": 42.7, "judge": 0.8},
            uses=2,
            notes=("The model cannot share a prefix; every completion has its own row." + hostile,) if hostile else (),
        )

    return build


@pytest.fixture(scope="session")
def report(make_report: Callable[..., Report]) -> Report:
    return make_report()


@pytest.fixture(scope="session")
def hostile_report(make_report: Callable[..., Report]) -> Report:
    return make_report(hostile=HOSTILE, count=40)
