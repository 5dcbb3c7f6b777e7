"""What a kind of stage is, and the table of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from preftune.app.context import Context
from preftune.app.runs import RunFolder
from preftune.core.errors import Blocked, Finding
from preftune.core.events import EventSink, Noted
from preftune.core.recipe import ModelConfig, Recipe, StageConfig
from preftune.core.records import Excluded, TokenisedExample
from preftune.core.registry import Registry

if TYPE_CHECKING:
    from preftune.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class StageData:
    """What a stage works on: tokenised examples, and the account of the rows that were left out.

    counts: rows left out, by reason. notes: what else was counted, such as ``boundary_appended`` and ``cut``. prompts: as
    text, of what is trained on or sampled from. is_pending: the data are made by a stage before, so they are read then.
    """

    train: list[TokenisedExample]
    select: list[TokenisedExample]
    excluded: list[Excluded]
    counts: dict[str, int]
    notes: dict[str, int]
    formats: dict[str, str]
    audit: dict[str, Any]
    prompts: list[str]
    has_chat_rows: bool
    is_pending: bool = False


@dataclass(frozen=True, slots=True)
class StartModel:
    """What is known of the model of a run before it is loaded.

    shapes: of its weights, None where unknown. tokenizer: as ``modeling.load.load_tokenizer`` gives it.
    """

    name: str
    tokenizer: Any
    max_positions: int
    num_parameters: int | None
    shapes: Any


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage of a run, ready to go.

    start: the model that the stage starts from. is_resumed: an earlier process may have begun it. is_asked: the model is to
    show that it can do the task, because nobody asked it before. ranks: the processes that train together.
    """

    recipe: Recipe
    index: int
    data: StageData
    start: ModelConfig
    run: RunFolder
    context: Context
    is_resumed: bool
    is_asked: bool = False
    ranks: Ranks = field(kw_only=True)

    @property
    def config(self) -> StageConfig:
        """The stage's section of the recipe."""
        return self.recipe.stages[self.index]


class StageKind(Protocol):
    """One kind of stage. Its record in ``run.json`` holds ``final`` where it leaves another model than it started from."""

    def read(self, recipe: Recipe, config: StageConfig, model: StartModel) -> StageData:
        """What is there before the run; InputError where it cannot be read."""

    def check(self, config: StageConfig, data: StageData, model: StartModel) -> list[Finding]:
        """Blockers and warnings of the stage."""

    def facts(self, config: StageConfig, data: StageData) -> dict[str, Any]:
        """The stage in a plan, as JSON."""

    def line(self, config: StageConfig, data: StageData) -> str:
        """The stage in a plan, for a person."""

    def run(self, work: StageWork, sink: EventSink) -> Mapping[str, Any]:
        """Do it, keep the record in ``run.json``, and return that."""


stage_kinds: Registry[StageKind] = Registry("kind of stage", "preftune.app.stages")


def kind_of(config: StageConfig) -> StageKind:
    """The kind of a stage."""
    return stage_kinds.build(config.kind)


def say_and_refuse(findings: list[Finding], sink: EventSink) -> None:
    """Tell what was found of data that were not there before the run; Blocked where that stops it."""
    for one in findings:
        sink(Noted(one.level, one.code, f"{one.fact}; {one.way_out}"))
    blockers = [one for one in findings if one.level == "blocker"]
    if blockers:
        raise Blocked(blockers)


def counts_text(counts: Mapping[str, int]) -> str:
    """Reasons and how often each came, in words."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
