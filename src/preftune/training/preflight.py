"""Facts that stop a run before it costs anything, and facts worth a warning; each with its way out.

What published recipes use is in ``training.published``; every code is in ``core.findings``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from preftune.core.errors import Finding, UsageError
from preftune.core.recipe import StageConfig
from preftune.core.records import TokenisedExample
from preftune.data.split import Leak
from preftune.maths.losses.base import DataAwareLoss, losses
from preftune.training.optim import num_steps_of, schedule_of
from preftune.training.published import check_published
from preftune.training.selection import check_selectable

SMALL = 50_000_000  # parameters; smaller models want learning rates that no published recipe has


class StageFacts(Protocol):
    """What is known of a stage's data."""

    @property
    def train(self) -> Sequence[TokenisedExample]:
        """Tokenised examples to train on."""

    @property
    def select(self) -> Sequence[TokenisedExample]:
        """Tokenised examples that are held out."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows left out, by reason."""

    @property
    def has_chat_rows(self) -> bool:
        """Whether rows need a chat template."""


def check_stage(
    config: StageConfig, data: StageFacts, *, has_chat_template: bool, num_parameters: int | None = None
) -> list[Finding]:
    """Every finding about a stage's data and settings.

    num_parameters: of the model where known; published learning rates say nothing of models below SMALL.
    """
    findings: list[Finding] = []
    if data.has_chat_rows and not has_chat_template:
        fact = f"stage {config.name}: its data are conversations and the model has no chat template"
        return [Finding("blocker", "no_chat_template", fact, "set model.chat_template: chatml, plain or a file")]
    if not data.train:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(data.counts.items())) or "no rows were read"
        fact = f"stage {config.name}: no example is left to train on ({reasons})"
        return [Finding("blocker", "nothing_to_train", fact, "`preftune check FILE` shows each row that was left out and why")]
    findings += _check_splits(config, data)
    findings += _check_settings(config, len(data.train))
    findings += _check_labels(config, data.train)
    findings += _check_confidences(config, data.train)
    findings += check_published(config, is_small=num_parameters is not None and num_parameters < SMALL)
    return findings


def _check_labels(config: StageConfig, train: Sequence[TokenisedExample]) -> list[Finding]:
    """What a loss of labelled completions doubts about its weights on these data."""
    loss = losses.build(config.method, config.loss)
    if not isinstance(loss, DataAwareLoss):
        return []
    labels = [label for example in train for label in example.labels]
    counts = sum(labels), len(labels) - sum(labels)
    fitted = loss.fitted(*counts)
    doubt = fitted.doubt(*counts) if isinstance(fitted, DataAwareLoss) else ""
    way_out = "set one of the weights to auto, or add completions of the rarer label"
    return [Finding("warning", "label_weights", f"stage {config.name}: {doubt}", way_out)] if doubt else []


def _check_confidences(config: StageConfig, train: Sequence[TokenisedExample]) -> list[Finding]:
    """Labels that say how sure they are, for a loss that does not ask: each then counts as certain."""
    loss = losses.build(config.method, config.loss)
    if loss.view != "pairs" or "confidence" in loss.needs:
        return []
    doubted = [example for example in train if example.confidence is not None and example.confidence < 1]
    if not doubted:
        return []
    first = doubted[0]
    fact = (
        f"stage {config.name}: {config.method} does not read how sure a label is, so {len(doubted)} of {len(train)} pairs with a "
        f"confidence below 1 count as certain, first {first.provenance.file}:{first.provenance.line} ({first.confidence:g})"
    )
    way_out = "take a loss that reads confidences, such as dpo, or leave out the pairs that are doubted"
    return [Finding("warning", "confidence_not_read", fact, way_out)]


def check_leaks(found: Sequence[Leak], trained: str, held_out: str) -> list[Finding]:
    """Findings about prompts of a held-out set that were trained on; ``found`` is what ``data.split.leaks`` gave.

    Equal prompts block; nearly equal ones warn, because a narrow domain has them by nature.
    """
    findings: list[Finding] = []
    kinds: tuple[tuple[str, Literal["blocker", "warning"], str], ...] = (
        ("exact", "blocker", "also"),
        ("near", "warning", "nearly the same"),
    )
    for kind, level, word in kinds:
        places = [leak for leak in found if leak.kind == kind]
        if places:
            first = f"number {places[0].heldout + 1} is number {places[0].train + 1} there"
            fact = f"{len(places)} of {held_out} are {word} in {trained} (the first: {first})"
            way_out = "take them out of one of the two, or let preftune split one file by prompt"
            findings.append(Finding(level, "leakage" if kind == "exact" else "near_leakage", fact, way_out))
    return findings


def _check_splits(config: StageConfig, data: StageFacts) -> list[Finding]:
    findings: list[Finding] = []
    trained = {example.prompt_ids for example in data.train}
    leaked = [example for example in data.select if example.prompt_ids in trained]
    if leaked:
        where = f"{leaked[0].provenance.file}:{leaked[0].provenance.line}"
        shared = f"{len(leaked)} of {len(data.select)} held-out examples have a prompt of the training data"
        fact = f"stage {config.name}: {shared}, first {where}"
        way_out = "take them out of one of the two, or write data.select as a share, which splits by prompt"
        findings.append(Finding("blocker", "leakage", fact, way_out))
    try:
        check_selectable(config, len(data.select))
    except UsageError as error:
        fact, _, way_out = str(error).partition("; ")
        return [*findings, Finding("blocker", "nothing_to_choose_by", fact, way_out)]
    if not data.select and config.evals > 0:
        fact = f"stage {config.name}: no example is held out, so nothing will be measured while it trains"
        findings.append(Finding("warning", "empty_select", fact, "set data.select to a file or a share such as 0.1"))
    return findings


def _check_settings(config: StageConfig, num_examples: int) -> list[Finding]:
    findings: list[Finding] = []
    view = losses.factory(config.method).view
    steps = num_steps_of(config, num_examples)
    if steps == 1 and schedule_of(config, view, steps).at(0) == 0:
        fact = f"stage {config.name}: {num_examples} examples make one step, and the warm-up begins at learning rate 0"
        findings.append(Finding("blocker", "no_learning", fact, "lower pairs_per_step, or set warmup: 0"))
    return findings
