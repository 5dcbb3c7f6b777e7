"""Make the data of the demo from the trained starter: SFT stories, preference pairs and verdict prompts.

    PYTHONPATH=. python -m starter.make_pairs --model src/preftune/starter/model --output src/preftune/starter

Pairs: the starter answers each request several times, `judge_pairs.yaml` scores the answers, and the best and the worst
of like length become chosen and rejected. Completions that share a run of 20 words with a text that the starter was
trained on are left out. Verdict prompts are about heroes and objects that no other prompt has.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from preftune.core.records import Message
from preftune.judging.base import Candidate
from preftune.judging.rules import RulesJudge, load_rules
from starter.corpus import DEFAULT_TEXT_FOLDER, read_tinystories, shares_span, span_index, words_of
from starter.grammar import HEROES, Plan, Pool, grammar_examples
from starter.measure import draw_requests
from starter.sampling import Sample, Sampler
from starter.train import Settings
from starter.words import OBJECTS

# Every fourth hero and object belongs to the verdict.
VERDICT_POOL = Pool(HEROES[3::4], tuple(OBJECTS[3::4]))
TRAIN_POOL = Pool(
    tuple(hero for hero in HEROES if hero not in VERDICT_POOL.heroes),
    tuple(name for name in OBJECTS if name not in VERDICT_POOL.objects),
)
# 303 drew the prompts on which the settings of the demo were chosen; those that ship were drawn afterwards and chose nothing
PAIRS_SEED, SFT_SEED, VERDICT_SEED = 101, 202, 404
MIN_GAP, MAX_LENGTH_RATIO = 2.0, 1.3


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of one request, ordered by their scores."""

    prompt: str
    chosen: Sample
    rejected: Sample
    chosen_score: float
    rejected_score: float

    @property
    def is_chosen_longer(self) -> bool:
        """Compared in words, as a reader would."""
        return len(words_of(self.chosen.text)) > len(words_of(self.rejected.text))

    @property
    def is_same_length(self) -> bool:
        """Neither is longer."""
        return len(words_of(self.chosen.text)) == len(words_of(self.rejected.text))


def training_spans(text_folder: Path) -> set[int]:
    """All 20-word runs that the starter was trained on: TinyStories and the grammar stories of its settings."""
    settings = Settings()
    grammar = grammar_examples(settings.grammar_stories, settings.seed)
    return span_index([*read_tinystories(text_folder), *(example.story for example in grammar)])


def keeps_request(plan: Plan, text: str) -> bool:
    """Whether a story is about the hero, the adjective, the name and the object that were asked for."""
    words = set(words_of(text))
    wanted = {plan.hero, plan.adjective}
    if plan.name:
        wanted.add(plan.name.lower())
    if plan.mentions_object:
        wanted.add(plan.object)
    return wanted <= words


def best_and_worst(prompt: str, scored: Sequence[tuple[float, Sample]]) -> Pair | None:
    """The two samples with the largest difference of scores among those of like length, or None."""
    best: Pair | None = None
    for one, other in combinations(scored, 2):
        (low, rejected), (high, chosen) = sorted((one, other), key=lambda item: item[0])
        lengths = sorted(len(words_of(sample.text)) for sample in (chosen, rejected))
        if high - low < MIN_GAP or lengths[1] > MAX_LENGTH_RATIO * lengths[0]:
            continue
        if best is None or high - low > best.chosen_score - best.rejected_score:
            best = Pair(prompt, chosen, rejected, high, low)
    return best


def balance_lengths(pairs: Sequence[Pair], wanted: int) -> list[Pair]:
    """At most `wanted` pairs, in order, as many with the longer text chosen as with the shorter one."""
    limit = wanted // 2
    counts: Counter[str] = Counter()
    available = Counter("longer" if pair.is_chosen_longer else "shorter" for pair in pairs if not pair.is_same_length)
    limit = min(limit, available["longer"], available["shorter"])
    kept: list[Pair] = []
    for pair in pairs:
        kind = "same" if pair.is_same_length else "longer" if pair.is_chosen_longer else "shorter"
        if (kind != "same" and counts[kind] >= limit) or len(kept) >= wanted:
            continue
        counts[kind] += 1
        kept.append(pair)
    return kept


def make_pairs(
    sampler: Sampler, judge_file: Path, spans: set[int], *, prompts: int, samples: int, temperature: float, wanted: int
) -> tuple[list[Pair], Counter[str]]:
    """Pairs and the count of samples by what became of them."""
    judge = load_rules(judge_file.name, judge_file.parent)
    requests = draw_requests(prompts, PAIRS_SEED, TRAIN_POOL)
    repeated = [prompt for _, prompt in requests for _ in range(samples)]
    drawn = sampler.sample(repeated, temperature, PAIRS_SEED)
    counts: Counter[str] = Counter()
    pairs = []
    for index, (plan, prompt) in enumerate(requests):
        scored = []
        for sample in drawn[index * samples : (index + 1) * samples]:
            if not sample.is_complete:
                counts["not ended"] += 1
            elif not keeps_request(plan, sample.text):
                counts["not what was asked for"] += 1
            elif shares_span(sample.text, spans):
                counts["20 words of the training text"] += 1
            else:
                counts["usable"] += 1
                scored.append((score_of(judge, prompt, sample), sample))
        pair = best_and_worst(prompt, scored)
        if pair is not None:
            pairs.append(pair)
    counts["prompts with a pair"] = len(pairs)
    return balance_lengths(pairs, wanted), counts


def score_of(judge: RulesJudge, prompt: str, sample: Sample) -> float:
    """The judge's points for one completion."""
    candidate = Candidate(sample.text, sample.num_tokens, sample.is_complete)
    return round(judge.score((Message("user", prompt),), candidate), 4)


def message(role: str, content: str) -> list[dict[str, str]]:
    """A list of one turn."""
    return [{"role": role, "content": content}]


def write_rows(path: Path, rows: Iterable[object]) -> int:
    """Write JSON lines and return how many."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def sft_rows(count: int, spans: set[int]) -> list[dict[str, object]]:
    """Grammar stories of another seed, tones in equal shares, none with a run of 20 words of the training text."""
    examples = [example for example in grammar_examples(2 * count, SFT_SEED, TRAIN_POOL) if not shares_span(example.story, spans)]
    tones: Counter[str] = Counter()
    rows: list[dict[str, object]] = []
    for example in examples:
        if tones[example.tone] < count // 3:
            tones[example.tone] += 1
            rows.append({"prompt": message("user", example.prompt), "completion": message("assistant", example.story)})
    return rows


def main() -> None:
    """Write sft.jsonl, pairs.jsonl and verdict.jsonl, and print what was kept and why the rest was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/preftune/starter/model"))
    parser.add_argument("--output", type=Path, default=Path("src/preftune/starter"))
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT_FOLDER)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--wanted", type=int, default=720)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    output: Path = arguments.output
    spans = training_spans(arguments.text)
    sft = sft_rows(450, spans)
    print("sft", write_rows(output / "sft.jsonl", sft))
    verdict = sorted({prompt for _, prompt in draw_requests(300, VERDICT_SEED, VERDICT_POOL)})
    print("verdict", write_rows(output / "verdict.jsonl", ({"prompt": message("user", prompt)} for prompt in verdict)))
    pairs, counts = make_pairs(
        Sampler.load(arguments.model),
        output / "judge_pairs.yaml",
        spans,
        prompts=arguments.prompts,
        samples=arguments.samples,
        temperature=arguments.temperature,
        wanted=arguments.wanted,
    )
    rows = [
        {
            "prompt": message("user", pair.prompt),
            "chosen": message("assistant", pair.chosen.text),
            "rejected": message("assistant", pair.rejected.text),
            "provenance": {
                "generator": "starter",
                "judge": "judge_pairs.yaml",
                "seed": PAIRS_SEED,
                "temperature": arguments.temperature,
                "chosen_score": pair.chosen_score,
                "rejected_score": pair.rejected_score,
            },
        }
        for pair in pairs
    ]
    longer = sum(pair.is_chosen_longer for pair in pairs) / max(1, len(pairs))
    print("pairs", write_rows(output / "pairs.jsonl", rows), "chosen longer", round(longer, 3), dict(counts))


if __name__ == "__main__":
    main()
