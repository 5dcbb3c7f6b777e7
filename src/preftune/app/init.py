"""A folder to begin with: a recipe, pairs, verdict prompts and judges that run at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from preftune.core.errors import InputError, UsageError
from preftune.core.files import write_text
from preftune.core.records import Demonstration, Desirability, Example, demonstration_of, pair_of

STARTER_PAIRS, STARTER_PROMPTS = 240, 100
VERDICT_SHARE, MAX_VERDICT, MIN_ROWS = 0.1, 300, 10
NAMES = ("recipe.yaml", "pairs.jsonl", "prompts.jsonl", "judge.yaml", "judge_pairs.yaml")
NEUTRAL_JUDGE = """\
# The judge of the result. This one only asks whether an answer ends by itself and does not repeat itself: put what
# better means to you here. docs/evaluation.md lists the rules and the other judges.
name: rules
title: "whole and without repetition"
rules:
  - {kind: complete, weight: 2.0}
  - {kind: repetition, weight: -4.0}
"""


@dataclass(frozen=True, slots=True)
class Started:
    """What was written, what was seen in the user's file, and the commands to go on with."""

    folder: Path
    written: list[str]
    facts: list[str]
    commands: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"folder": str(self.folder), "written": self.written, "facts": self.facts, "commands": self.commands}

    def summary(self) -> list[str]:
        """What a person reads."""
        return [f"{self.folder}: wrote {', '.join(self.written)}", *self.facts, "next:", *(f"  {one}" for one in self.commands)]


def init(folder: Path, source: str | None = None, model: str | None = None) -> Started:
    """Fill a folder, with the starter's pairs or with the user's own.

    Parameters
        source: a file of pairs, labels or demonstrations in any format that preftune reads.
        model: the model to name in the recipe; the starter by default.

    Raises
        UsageError: the folder holds one of the files already; nothing is written.
        InputError: the file cannot be read, or holds too few rows to hold any out.
    """
    there = [name for name in NAMES if (folder / name).exists()]
    if there:
        raise UsageError(f"{folder / there[0]} exists; init never overwrites, choose another folder")
    contents, facts = _from_starter(model) if source is None else _from_file(source, model)
    for name, content in contents.items():
        write_text(folder / name, content)
    where = "" if folder == Path() else f"cd {folder} && "
    commands = [f"{where}preftune check pairs.jsonl", f"{where}preftune plan recipe.yaml", f"{where}preftune run recipe.yaml"]
    return Started(folder, list(contents), facts, commands)


def _from_starter(model: str | None) -> tuple[dict[str, str], list[str]]:
    recipe = _recipe(
        model or "starter",
        [("dpo", ["beta: 0.1                  # lower drifts further from the reference", *_rates(model, "1e-4", "5e-7")])],
        judge_note="shares no word with the judge that made the pairs",
        pairs_judge=True,
    )
    contents = {
        "recipe.yaml": recipe,
        "pairs.jsonl": _head("pairs.jsonl", STARTER_PAIRS),
        "prompts.jsonl": _head("verdict.jsonl", STARTER_PROMPTS),
        "judge.yaml": _starter("judge_verdict.yaml"),
        "judge_pairs.yaml": _starter("judge_pairs.yaml"),
    }
    return contents, [f"{STARTER_PAIRS} pairs of the starter: the warmer of two stories is chosen"]


def _from_file(source: str, model: str | None) -> tuple[dict[str, str], list[str]]:
    from preftune.data.audit import audit
    from preftune.data.pipeline import read_examples
    from preftune.data.split import split_by_prompt

    read = read_examples([source])
    examples = read.examples
    if len(examples) < MIN_ROWS:
        raise InputError(f"{source}: {len(examples)} good rows are too few to begin with; give {MIN_ROWS} or more")
    share = min(VERDICT_SHARE, MAX_VERDICT / len(examples))
    train, verdict = split_by_prompt(examples, share, 0)
    method = _method(train)
    seen = audit(train)
    form = next(iter(read.formats.values()))
    facts = [f"{source}: format {form}, {len(examples)} good rows, {read.num_excluded} left out"]
    options = ["beta: 0.1                  # lower drifts further from the reference"] if method != "sft" else []
    bias = seen.get("length_bias")
    if method == "dpo" and bias is not None and bias["band"] != "green":
        share_longer = bias["share_chosen_longer"]
        facts.append(f"the longer completion is chosen in {share_longer:.0%} of the pairs, so the loss divides by length")
        options = ["length_normalised: true    # longer completions are not better for being long", "beta: 5"]
    stages = [] if method == "sft" or model is not None else [("sft", _rates(model, "3e-4", "2e-5"))]
    stages.append((method, [*options, *_rates(model, "1e-4", "5e-7")]))
    if model is None:
        facts.append(
            "the recipe names the starter, which knows stories only: name your own model in recipe.yaml, or with --model"
        )
    facts.append(f"{len(verdict)} rows by prompt are held out for the verdict; judge.yaml is neutral, write what better means")
    prompts = {json.dumps(row, ensure_ascii=False): None for row in map(_prompt_row, verdict)}
    contents = {
        "recipe.yaml": _recipe(model or "starter", stages, judge_note="neutral: write what better means to you"),
        "pairs.jsonl": "".join(json.dumps(_row(one, method), ensure_ascii=False) + "\n" for one in train if _row(one, method)),
        "prompts.jsonl": "".join(f"{row}\n" for row in prompts),
        "judge.yaml": NEUTRAL_JUDGE,
    }
    return contents, facts


def _method(examples: Sequence[Example]) -> str:
    """What the rows are for: the method that takes most of them."""
    pairs = sum(pair_of(one) is not None for one in examples)
    labels = sum(isinstance(one.judgement, Desirability) for one in examples)
    shown = sum(isinstance(one.judgement, Demonstration) for one in examples)
    counts = {"dpo": pairs, "kto": labels, "sft": shown}
    return max(counts, key=lambda name: counts[name])


def _row(example: Example, method: str) -> dict[str, Any]:
    """The row of pairs.jsonl; empty for a row that the method cannot use."""
    turns = [message.to_dict() for message in example.prompt]
    prompt: Any = turns[0]["content"] if example.style == "text" else turns

    def completion(messages: Any) -> Any:
        written = [message.to_dict() for message in messages]
        return written[0]["content"] if example.style == "text" else written

    tools = {"tools": [dict(tool) for tool in example.tools]} if example.tools else {}
    pair = pair_of(example)
    if method == "dpo" and pair is not None:
        return {"prompt": prompt, "chosen": completion(pair.chosen), "rejected": completion(pair.rejected), **tools}
    if method == "kto" and isinstance(example.judgement, Desirability):
        label = example.judgement.is_desirable
        return {"prompt": prompt, "completion": completion(example.completions[0]), "label": label, **tools}
    shown = demonstration_of(example)
    if method == "sft" and shown is not None:
        return {"prompt": prompt, "completion": completion(shown), **tools}
    return {}


def _prompt_row(example: Example) -> dict[str, Any]:
    return {"prompt": [message.to_dict() for message in example.prompt]}


def _rates(model: str | None, small: str, usual: str) -> list[str]:
    """The learning rate line: the starter is tiny; for another model the default of the method and adapter applies."""
    if model is None:
        return [f"lr: {small}                   # a tiny model; for a billion weights it would be {usual}"]
    return ["# lr: left out, so that the published default for the method and the adapter applies"]


def _recipe(model: str, stages: Sequence[tuple[str, Sequence[str]]], *, judge_note: str, pairs_judge: bool = False) -> str:
    """The recipe with a comment for each line that one is likely to change."""
    adapter = (
        "full                # two million weights need no adapters" if model == "starter" else "lora                # or full"
    )
    lines = [
        "# Written by `preftune init`. Every key is in docs/recipe.md; `preftune plan recipe.yaml` says what it would do.",
        f"model: {json.dumps(model)}             # a folder, a hub id, or starter",
        "seed: 1",
        f"adapter: {adapter}",
        "pairs_per_step: 16           # examples of an optimiser step",
        "stages:",
    ]
    for method, options in stages:
        lines.append(f"  - method: {method}")
        lines.append("    data: {train: pairs.jsonl, select: 0.1}   # a tenth, by prompt, to watch while it trains")
        lines += [f"    {option}" for option in options]
    lines += [
        "evaluation:",
        "  prompts: prompts.jsonl     # shares no prompt with pairs.jsonl",
        f"  judge: judge.yaml          # {judge_note}",
        *(["  pairs_judge: judge_pairs.yaml"] if pairs_judge else []),
        "  margin: 0.1                # a win rate within 0.5 +- 0.1 counts as equal",
        "  decoding: {temperature: 0.7, max_new_tokens: 200}",
    ]
    return "\n".join(lines) + "\n"


def _starter(name: str) -> str:
    return (files("preftune") / "starter" / name).read_text(encoding="utf-8")


def _head(name: str, count: int) -> str:
    return "".join(_starter(name).splitlines(keepends=True)[:count])
