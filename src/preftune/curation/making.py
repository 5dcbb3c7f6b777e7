"""Make pairs: sample from a model, judge, pair, and write down everything that led to them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from preftune.core.errors import CheckpointError, InputError, Interrupted
from preftune.core.events import EventSink, Progress
from preftune.core.files import write_json, write_text
from preftune.core.ids import digest_json
from preftune.core.recipe import GenerateConfig
from preftune.core.records import Message
from preftune.curation.judgement import Case, PointwiseJudge, ask_ahead, score_samples, tie_margin_of
from preftune.curation.pairing import Pair, Scored, pair_up
from preftune.curation.prompts import prompt_digest
from preftune.curation.record import Drawn, Record
from preftune.data.pipeline import PromptRow
from preftune.data.tokenize import prompt_ids_of
from preftune.judging.base import Candidate, Judge, NoVerdict, names_of
from preftune.modeling.generate import generate
from preftune.modeling.load import LoadedModel
from preftune.modeling.reference import weights_digest

Scores: TypeAlias = Sequence[Sequence[float] | None]
PROMPTS_AHEAD = 16  # prompts whose comparisons are asked for together


@dataclass(frozen=True, slots=True)
class PairTask:
    """What to make pairs from.

    Parameters
        load: gives the model on its device; called once, and the model is let go before the first judgement.
        generator: the model's name in the rows. prompts: what ``choose_prompts`` chose. left_out: what it left out, by reason.
        seed: of every draw. folder: where the record goes. out: the file of pairs.
    """

    config: GenerateConfig
    load: Callable[[], LoadedModel]
    generator: str
    judge: Judge
    prompts: Sequence[PromptRow]
    left_out: Counter[str]
    seed: int
    folder: Path
    out: Path


@dataclass(frozen=True, slots=True)
class MadePairs:
    """The pairs that were made, and their account in JSON values."""

    out: Path
    folder: Path
    summary: Mapping[str, Any]

    @property
    def num_pairs(self) -> int:
        """Pairs in the file."""
        return int(self.summary["pairs"])


@dataclass(frozen=True, slots=True)
class _Source:
    """The model as rows tell of it, and the prompts that it has room for."""

    generator: str
    weights: str
    dtype: str
    prompts: list[PromptRow]
    digests: list[str]


def make_pairs(task: PairTask, sink: EventSink, should_stop: Callable[[], bool]) -> MadePairs:
    """Sample, judge and pair; or go on where an earlier process stopped. The same files, byte for byte, either way.

    Raises
        InputError: the prompts leave the model no room at all.
        CheckpointError: the folder holds the record of another request.
        Interrupted: ``should_stop`` said so; what was sampled and judged is kept.
    """
    left_out = Counter(task.left_out)
    source, record = _sample(task, left_out, sink, should_stop)
    scores = _judge(task, source, record, sink, should_stop)
    rows: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    tie_margin = tie_margin_of(task.judge)
    for row, digest, samples, scored in zip(source.prompts, source.digests, _by_prompt(task, record), scores, strict=True):
        if scored is None:
            left_out["no_verdict"] += 1
            continue
        candidates = [Scored(one.number, one.text, one.is_complete, score) for one, score in zip(samples, scored, strict=True)]
        kept, refused = pair_up(candidates, task.config, sample_seed(task.seed, digest, -1), tie_margin)
        left_out.update(refused)
        if not kept:
            left_out["no_pair"] += 1
        pairs += kept
        rows += [_pair_row(task, source, row, digest, pair) for pair in kept]
    summary = _summary(task, source, record, scores, pairs, left_out)
    write_text(task.folder / "samples.jsonl", "".join(_sample_lines(task, source, record, scores)))
    write_json(task.folder / "summary.json", summary)
    write_text(task.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return MadePairs(task.out, task.folder, summary)


def sample_seed(seed: int, prompt: str, number: int) -> int:
    """The seed of one sample: a function of the run's seed, the prompt and the sample's number alone.

    >>> sample_seed(7, "ab", 0) == sample_seed(7, "ab", 0) != sample_seed(7, "ab", 1)
    True
    """
    return int(digest_json([seed, prompt, number])[:15], 16)


def _sample(task: PairTask, left_out: Counter[str], sink: EventSink, should_stop: Callable[[], bool]) -> tuple[_Source, Record]:
    """Every sample, those of an earlier process included. The model lives in this function only."""
    loaded = task.load()
    config, num_samples = task.config, task.config.samples
    ids = [prompt_ids_of(row.prompt, loaded.tokenizer, style=row.style, tools=row.tools) for row in task.prompts]
    places = [place for place, one in enumerate(ids) if 0 < len(one) < loaded.max_positions]
    if len(places) < len(ids):
        left_out["no_room"] = len(ids) - len(places)
    if not places:
        raise InputError(f"{config.prompts}: no prompt is left to sample from; {_words(left_out) or 'skip and limit leave none'}")
    prompts = [task.prompts[place] for place in places]
    digests = [prompt_digest(row) for row in prompts]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    source = _Source(task.generator, weights_digest(loaded.model), dtype, prompts, digests)
    wanted = [(digest, number, sample_seed(task.seed, digest, number)) for digest in digests for number in range(num_samples)]
    batch = max(1, config.decoding.batch_size // num_samples) * num_samples
    request = {
        "model": [source.weights, loaded.tokenizer.identity, dtype],
        "prompts": digest_json(digests),
        "samples": num_samples,
        "decoding": config.decoding.model_dump(mode="json"),
        "seed": task.seed,
        "judge": task.judge.identity,
        "comparisons": config.comparisons,
    }
    record = Record.open(task.folder, request, wanted, batch)
    while len(record.drawn) < len(wanted):
        start = len(record.drawn)
        if should_stop():
            raise Interrupted(f"stopped after {start} of {len(wanted)} samples; they are kept, resume to go on")
        part = wanted[start : start + batch]
        asked = [ids[places[(start + place) // num_samples]] for place in range(len(part))]
        written = generate(loaded.model, loaded.tokenizer, asked, config.decoding, [seed for _, _, seed in part])
        record.add_samples(
            [
                Drawn(digest, number, seed, one.text, one.num_tokens, one.is_complete)
                for (digest, number, seed), one in zip(part, written, strict=True)
            ]
        )
        sink(Progress("sampling", len(record.drawn), len(wanted)))
    return source, record


def _judge(
    task: PairTask, source: _Source, record: Record, sink: EventSink, should_stop: Callable[[], bool]
) -> list[list[float] | None]:
    """The scores of every prompt's samples; None where the judge gave no verdict on some of them."""
    scores: list[list[float] | None] = []
    cases = [
        Case(
            row.prompt,
            [Candidate(one.text, one.num_tokens, one.is_complete) for one in samples],
            record.known.setdefault(digest, {}),
            partial(record.add_judgement, digest),
        )
        for row, digest, samples in zip(source.prompts, source.digests, _by_prompt(task, record), strict=True)
    ]
    for place, case in enumerate(cases):
        if should_stop():
            raise Interrupted(f"stopped after judging {len(scores)} of {len(source.prompts)} prompts; resume to go on")
        if place % PROMPTS_AHEAD == 0:
            ask_ahead(task.judge, cases[place : place + PROMPTS_AHEAD], task.config.comparisons)
        try:
            scored = score_samples(task.judge, case.prompt, case.samples, task.config.comparisons, case.known, case.record)
        except NoVerdict:
            scores.append(None)
            continue
        if not all(math.isfinite(score) for score in scored):
            raise CheckpointError(
                f"the judge gave a score that is no number for prompt {len(scores) + 1}; mend the judge, delete {task.folder}"
            )
        scores.append(scored)
        sink(Progress("judging", len(scores), len(source.prompts)))
    return scores


def _by_prompt(task: PairTask, record: Record) -> Iterator[list[Drawn]]:
    size = task.config.samples
    return (record.drawn[start : start + size] for start in range(0, len(record.drawn), size))


def _pair_row(task: PairTask, source: _Source, row: PromptRow, digest: str, pair: Pair) -> dict[str, Any]:
    """A row that every reader of TRL's preference type takes, and where it comes from."""
    is_chat = row.style == "chat"
    texts: dict[str, Any] = {"prompt": [message.to_dict() for message in row.prompt] if is_chat else row.prompt[0].content}
    for side, sample in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        texts[side] = [Message("assistant", sample.text).to_dict()] if is_chat else sample.text
    tools = {"tools": [dict(tool) for tool in row.tools]} if row.tools else {}
    return {
        **texts,
        **tools,
        "generators": [f"{source.generator}@{source.weights}"],
        "judges": names_of(task.judge),
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
        "prompt_digest": digest,
        "samples": [pair.chosen.number, pair.rejected.number],
    }


def _sample_lines(task: PairTask, source: _Source, record: Record, scores: Scores) -> Iterator[str]:
    decoding = task.config.decoding.model_dump(mode="json")
    for row, samples, scored in zip(source.prompts, _by_prompt(task, record), scores, strict=True):
        known: Sequence[float | None] = [None] * len(samples) if scored is None else scored
        for sample, score in zip(samples, known, strict=True):
            made = {
                "prompt": [message.to_dict() for message in row.prompt],
                "prompt_digest": sample.prompt,
                "number": sample.number,
                "text": sample.text,
                "num_tokens": sample.num_tokens,
                "is_complete": sample.is_complete,
                "score": score,
                "seed": sample.seed,
                "generator": source.generator,
                "weights": source.weights,
                "dtype": source.dtype,
                "decoding": decoding,
                "judge": task.judge.identity,
            }
            yield json.dumps(made, ensure_ascii=False) + "\n"


def _summary(
    task: PairTask,
    source: _Source,
    record: Record,
    scores: Scores,
    pairs: Sequence[Pair],
    left_out: Counter[str],
) -> dict[str, Any]:
    flat = np.array([score for scored in scores for score in scored or ()])
    distinct = [len({one.text for one in samples}) / len(samples) for samples in _by_prompt(task, record)]
    summary: dict[str, Any] = {
        "prompts": len(source.prompts),
        "samples": len(record.drawn),
        "pairs": len(pairs),
        "left_out": dict(sorted(left_out.items())),
        "pairing": task.config.pairing,
        "score": _distribution(flat),
        "complete_share": float(np.mean([one.is_complete for one in record.drawn])),
        "distinct_share": float(np.mean(distinct)),
        "num_tokens": sum(one.num_tokens for one in record.drawn),
        "generator": f"{source.generator}@{source.weights}",
        "judge": task.judge.describe(),
        "is_pointwise": isinstance(task.judge, PointwiseJudge),
        "seed": task.seed,
    }
    if pairs:
        chosen, rejected = ([len(getattr(pair, side).text) for pair in pairs] for side in ("chosen", "rejected"))
        summary |= {
            "margin": float(np.mean([pair.margin for pair in pairs])),
            "length_ratio": sum(chosen) / sum(rejected),
            "chosen_longer_share": float(np.mean([ours > theirs for ours, theirs in zip(chosen, rejected, strict=True)])),
        }
    return summary


def _distribution(scores: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean and quartiles; empty where nothing was scored."""
    if not scores.size:
        return {}
    low, middle, high = (float(one) for one in np.quantile(scores, [0.25, 0.5, 0.75]))
    ends = {"mean": float(scores.mean()), "min": float(scores.min())}
    return {**ends, "quarter": low, "median": middle, "three_quarters": high, "max": float(scores.max())}


def _words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
