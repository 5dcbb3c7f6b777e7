"""Findings that need more than one module: what a stage's pairs are like, the machine's disk, the verdict set's size."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preftune.core.errors import Finding, PreftuneError
from preftune.core.recipe import EvaluationConfig, Recipe, StageConfig

if TYPE_CHECKING:
    from preftune.training.model_files import Shapes

MAX_SHARE_TOO_LONG = 0.05
MAX_SHARE_IDENTICAL = 0.01
MAX_LENGTH_RATIO = 1.5
BALANCED = (0.42, 0.58)  # share of pairs whose longer completion is the chosen one; data.audit's amber begins outside
TIGHT = 0.85
TOO_LONG = ("too_long", "prompt_too_long")
IDENTICAL = ("identical", "identical_tokens", "identical_after_cut")
_GB = 1e9


class PairFacts(Protocol):
    """What reading a stage's data left behind."""

    @property
    def train(self) -> Sequence[Any]:
        """Examples that stayed."""

    @property
    def select(self) -> Sequence[Any]:
        """Examples that are held out."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows left out, by reason."""

    @property
    def audit(self) -> dict[str, Any]:
        """What ``data.audit`` says of them."""


def check_pairs(config: StageConfig, data: PairFacts, max_length: int) -> list[Finding]:
    """Warnings about pairs that do not fit, say nothing, contradict one another, or give the label away by length."""
    return [
        *_check_fit(config, data, max_length),
        *_check_identical(config, data),
        *_check_contradictions(config, data),
        *_check_lengths(config, data),
    ]


def _check_fit(config: StageConfig, data: PairFacts, max_length: int) -> list[Finding]:
    too_long = sum(data.counts.get(reason, 0) for reason in TOO_LONG)
    rows = _num_rows(data)
    if too_long <= MAX_SHARE_TOO_LONG * rows:
        return []
    asked = None if config.data is None else config.data.max_length
    is_models = asked is not None and asked > max_length  # what the recipe allows, the model's positions do not
    limit = f"{max_length} tokens{', all positions that the model has' if is_models else ''}"
    fact = f"stage {config.name}: {too_long} of {rows} rows ({too_long / rows:.0%}) are longer than {limit}"
    way_out = f"{'take a model with more positions' if is_models else 'raise data.max_length'}, or set data.too_long: cut"
    return [Finding("warning", "pairs_do_not_fit", fact, way_out)]


def _check_identical(config: StageConfig, data: PairFacts) -> list[Finding]:
    identical, rows = sum(data.counts.get(reason, 0) for reason in IDENTICAL), _num_rows(data)
    if identical == 0 or identical < MAX_SHARE_IDENTICAL * rows:
        return []
    fact = f"stage {config.name}: {identical} of {rows} pairs ({identical / rows:.0%}) have two identical completions"
    return [Finding("warning", "identical_pairs", fact, "they are left out; look at how the pairs were made")]


def _check_contradictions(config: StageConfig, data: PairFacts) -> list[Finding]:
    findings: list[Finding] = []
    exact = data.counts.get("contradictory", 0)
    if exact:
        fact = f"stage {config.name}: {exact} rows prefer the same two completions both ways"
        findings.append(
            Finding("warning", "contradictory_pairs", fact, "they are left out; `preftune check FILE` names them, look at both")
        )
    near = data.audit.get("near_contradictions", {})
    if near.get("rows"):
        fact = (
            f"stage {config.name}: {near['rows']} pairs of rows prefer nearly the same two completions in opposite ways, "
            f"first {near['first']}"
        )
        findings.append(Finding("warning", "near_contradictions", fact, "they stay in; remove the wrong one of each"))
    return findings


def _check_lengths(config: StageConfig, data: PairFacts) -> list[Finding]:
    from preftune.statistics.intervals import wilson

    bias = data.audit.get("length_bias")
    if bias is None:
        return []
    pairs, lengths = data.audit["pairs"], data.audit["characters"]
    share, interval = bias["share_chosen_longer"], wilson(bias["share_chosen_longer"] * pairs, pairs)
    ratio = lengths["chosen"]["mean"] / max(1.0, lengths["rejected"]["mean"])
    is_lopsided = interval.low > BALANCED[1] or interval.high < BALANCED[0]
    if not is_lopsided and 1 / MAX_LENGTH_RATIO <= ratio <= MAX_LENGTH_RATIO:
        return []
    fact = (
        f"stage {config.name}: the longer completion is the chosen one in {share:.0%} of {pairs} pairs "
        f"[{interval.low:.0%}, {interval.high:.0%}], and chosen completions are {ratio:.2f} x as long as rejected ones"
    )
    way_out = "balance the pairs, or divide by length (dpo: length_normalised), and read the length-controlled win rate"
    return [Finding("warning", "length_imbalance", fact, way_out)]


def _num_rows(data: PairFacts) -> int:
    return len(data.train) + len(data.select) + sum(data.counts.values())


def model_finding(error: PreftuneError) -> Finding:
    """The blocker that an error of loading a tokenizer or a model's config is."""
    from preftune.modeling.load import MissingPackage, NotATextModel

    if isinstance(error, NotATextModel):
        return Finding("blocker", "not_a_text_model", str(error), "name a decoder-only text model")
    if isinstance(error, MissingPackage):
        return Finding("blocker", "missing_dependency", str(error), "install the package that is named")
    way_out = "name a folder that holds a model, a hub id that this machine can reach, or model: starter"
    return Finding("blocker", "no_model", str(error), way_out)


def check_verdict_size(evaluation: EvaluationConfig, num_prompts: int) -> list[Finding]:
    """A warning where most results would be inconclusive: the minimum detectable effect is above twice the margin."""
    from preftune.statistics.power import detectable_effect, prompts_needed

    effect = detectable_effect(num_prompts)
    if effect <= 2 * evaluation.margin:
        return []
    needed = prompts_needed(min(0.5, 2 * evaluation.margin))
    fact = (
        f"{num_prompts} verdict prompts show a win rate of {0.5 + effect:.1%} or more (80 % power), "
        f"and the margin is {evaluation.margin:.0%}"
    )
    return [Finding("warning", "small_verdict_set", fact, f"use {needed} prompts or more, or a wider evaluation.margin")]


def checkpoint_bytes(config: StageConfig, shapes: Shapes, precision: str) -> tuple[int, int]:
    """Bytes of one checkpoint and of the final model of a stage: weights, float32 masters and two moments."""
    from preftune.training.model_files import num_trainable

    trainable = num_trainable(config, shapes)
    width = 2 if precision == "bfloat16" else 4
    model = trainable * (width if config.adapter == "full" else 4)
    return model + 12 * trainable, model


def check_disk(recipe: Recipe, needs: Sequence[tuple[int, int]]) -> list[Finding]:
    """Whether the disk holds the checkpoints and models of every stage; ``needs`` is ``checkpoint_bytes`` of each.

    While one checkpoint is written, ``keep_checkpoints`` older ones are still there.
    """
    total = sum(
        one * (min(config.keep_checkpoints, config.checkpoints) + 1) * (config.checkpoints > 0) + final
        for config, (one, final) in zip(recipe.stages, needs, strict=True)
    )
    folder = Path(recipe.output).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if total <= TIGHT * free:
        return []
    fact = f"checkpoints and models need {total / _GB:.2f} GB, and {folder} has {free / _GB:.2f} GB free"
    way_out = "free some space, choose another output, or lower keep_checkpoints"
    return [Finding("blocker" if total > free else "warning", "disk_space", fact, way_out)]
