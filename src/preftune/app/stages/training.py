"""Stages that train: a loss on examples, which a generate stage before may still have to make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.app.runs import RunFolder
from preftune.app.stages.base import StageData, StageWork, StartModel, counts_text, say_and_refuse, stage_kinds
from preftune.core.errors import Finding, InputError
from preftune.core.events import EventSink
from preftune.core.files import read_json, write_text
from preftune.core.recipe import Recipe, StageConfig
from preftune.core.rounds import GENERATE, PREVIOUS

PENDING = StageData([], [], [], {}, {}, {}, {}, [], has_chat_rows=False, is_pending=True)
MADE_FILE = "pairs.jsonl"


@stage_kinds.register("train")
@dataclass(frozen=True, slots=True)
class TrainingStage:
    """A method on a model and data."""

    def read(self, recipe: Recipe, config: StageConfig, model: StartModel) -> StageData:
        """The examples as tokens; pending where a stage before makes them."""
        from preftune.app.plan import limit_of, read_stage

        if is_pending(config):
            return PENDING
        return read_stage(recipe, config, model.tokenizer, limit_of(config.data, model.max_positions))

    def check(self, config: StageConfig, data: StageData, model: StartModel) -> list[Finding]:
        """Findings about data and settings; of pending data, about the settings that need none."""
        from preftune.app.checks import check_pairs
        from preftune.app.plan import limit_of
        from preftune.training.available import check_available
        from preftune.training.model_files import check_adapter
        from preftune.training.preflight import check_stage

        findings = [*check_adapter(config, model.name, model.shapes), *check_available(config)]
        if data.is_pending:
            return findings
        has_template = model.tokenizer.has_chat_template
        return [
            *check_stage(config, data, has_chat_template=has_template, num_parameters=model.num_parameters),
            *findings,
            *check_pairs(config, data, limit_of(config.data, model.max_positions)),
        ]

    def facts(self, config: StageConfig, data: StageData) -> dict[str, Any]:
        """Counts, steps and tokens."""
        from preftune.training.optim import num_steps_of

        facts = {"name": config.name, "method": config.method, "adapter": config.adapter}
        if data.is_pending:
            return {**facts, "is_pending": True}
        return {
            **facts,
            "train": len(data.train),
            "select": len(data.select),
            "steps": num_steps_of(config, len(data.train)),
            "tokens": sum(example.num_tokens for example in data.train),
            "left_out": data.counts,
            "notes": data.notes,
            "formats": data.formats,
            "audit": data.audit,
        }

    def line(self, config: StageConfig, data: StageData) -> str:
        """Counts, steps and tokens in a line."""
        if data.is_pending:
            return f"stage {config.name}: {config.method}, {config.adapter}, on the pairs that the stage before makes"
        facts = self.facts(config, data)
        notes = "".join(f"; {note} {count}" for note, count in sorted(data.notes.items()))
        left_out = f"; left out: {counts_text(data.counts)}" if data.counts else ""
        return (
            f"stage {config.name}: {config.method}, {config.adapter}, {facts['train']} examples to train, "
            f"{facts['select']} held out, {facts['steps']} steps of {config.pairs_per_step}, "
            f"{facts['tokens']:,} tokens an epoch{left_out}{notes}"
        )

    def run(self, work: StageWork, sink: EventSink) -> Mapping[str, Any]:
        """Train; pending data are read and checked first."""
        from preftune.app.train import train_stage

        return train_stage(self._with_data(work, sink) if work.data.is_pending else work, sink)

    def _with_data(self, work: StageWork, sink: EventSink) -> StageWork:
        import json

        from preftune.app.plan import limit_of, read_stage
        from preftune.modeling.load import load_tokenizer, read_max_positions
        from preftune.training.model_files import num_parameters_of

        config = with_made_pairs(work.recipe, work.index, work.run)
        tokenizer, positions = load_tokenizer(work.start), read_max_positions(work.start)
        data = read_stage(work.recipe, config, tokenizer, limit_of(config.data, positions))
        folder = work.run.stage_folder(work.index, config.name)
        rows = ({"stage": config.name, **row.to_dict()} for row in data.excluded)
        write_text(folder / "excluded.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        model = StartModel(work.start.name, tokenizer, positions, num_parameters_of(work.start.name), None)
        say_and_refuse(self.check(config, data, model), sink)
        return replace(work, data=data)


def is_pending(config: StageConfig) -> bool:
    """Whether some of a stage's data are made by a stage before it."""
    return config.data is not None and PREVIOUS in config.data.train


def with_made_pairs(recipe: Recipe, index: int, run: RunFolder) -> StageConfig:
    """A stage whose ``previous`` is the file that the nearest generate stage before made in this run.

    Raises
        InputError: that stage has not made it.
    """
    config = recipe.stages[index]
    if config.data is None or not is_pending(config):
        return config
    maker = max(place for place in range(index) if recipe.stages[place].method == GENERATE)
    made = run.stage_folder(maker, recipe.stages[maker].name) / MADE_FILE
    if not made.is_file():
        raise InputError(f"{made}: stage {recipe.stages[maker].name} has not made its pairs; resume the run")
    train = tuple(str(made) if one == PREVIOUS else one for one in config.data.train)
    return config.model_copy(update={"data": config.data.model_copy(update={"train": train})})


def data_counts(folder: Path) -> dict[str, int]:
    """What a stage read and used, from its ``data.json``."""
    data = read_json(folder / "data.json")
    used = data["used"] if "used" in data else {"train": data["train"], "held out": data["select"]}
    return {**used, **data["counts"], **data["notes"]}
