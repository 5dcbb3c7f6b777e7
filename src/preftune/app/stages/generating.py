"""Stages that make pairs: sample from the model, judge, pair. The model goes on to the next stage as it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.stages.base import StageData, StageWork, StartModel, counts_text, stage_kinds
from preftune.app.stages.training import MADE_FILE
from preftune.core.errors import Blocked, Finding, InputError, PreftuneError
from preftune.core.events import EventSink, Noted
from preftune.core.files import write_json
from preftune.core.recipe import GenerateConfig, Recipe, StageConfig
from preftune.core.rounds import seed_of

if TYPE_CHECKING:
    from preftune.curation.making import MadePairs

SAMPLES_FOLDER = "record"


@stage_kinds.register("generate")
@dataclass(frozen=True, slots=True)
class GeneratingStage:
    """Pairs from the model that the stage starts from."""

    def read(self, recipe: Recipe, config: StageConfig, model: StartModel) -> StageData:
        """The prompts, none of the verdict set left out: those block the run."""
        from preftune.curation.prompts import choose_prompts, text_of_prompt

        del recipe, model
        rows, left_out = choose_prompts(_section(config))
        has_chat_rows = any(row.style == "chat" for row in rows)
        prompts = [text_of_prompt(row) for row in rows]
        return StageData([], [], [], dict(left_out), {}, {}, {}, prompts, has_chat_rows=has_chat_rows)

    def check(self, config: StageConfig, data: StageData, model: StartModel) -> list[Finding]:
        """Findings about prompts, judge and chat template."""
        from preftune.judging.base import load_judge

        section = _section(config)
        findings: list[Finding] = []
        if data.has_chat_rows and not model.tokenizer.has_chat_template:
            fact = f"stage {config.name}: its prompts are conversations and the model has no chat template"
            findings.append(Finding("blocker", "no_chat_template", fact, "set model.chat_template: chatml, plain or a file"))
        try:
            load_judge(section.judge, Path.cwd())
        except PreftuneError as error:
            fact = f"stage {config.name}: {error}"
            findings.append(Finding("blocker", "unreadable_judge", fact, "name a judge file, or write the judge in the recipe"))
        asked = section.limit
        if not data.prompts or (asked is not None and len(data.prompts) < asked):
            wanted = f", {asked} are asked for after the first {section.skip}" if asked is not None else ""
            fact = f"stage {config.name}: {section.prompts} leaves {len(data.prompts)} prompts to sample from{wanted}"
            way_out = "give more prompts, or lower prompts_per_round, limit or skip"
            findings.append(Finding("blocker", "too_few_prompts", fact, way_out))
        if section.decoding.temperature == 0:
            fact = f"stage {config.name}: temperature 0 gives the same sample every time, so no pair can be made"
            findings.append(Finding("blocker", "no_variety", fact, "set decoding.temperature, 0.7 to 1.0 is usual"))
        return findings

    def facts(self, config: StageConfig, data: StageData) -> dict[str, Any]:
        """Prompts and settings."""
        section = _section(config).model_dump(mode="json")
        return {"name": config.name, "method": config.method, "prompts": len(data.prompts), "left_out": data.counts, **section}

    def line(self, config: StageConfig, data: StageData) -> str:
        """Prompts, samples and pairing in a line."""
        section = _section(config)
        left_out = f"; left out: {counts_text(data.counts)}" if data.counts else ""
        return (
            f"stage {config.name}: {section.samples} samples of each of {len(data.prompts)} prompts at temperature "
            f"{section.decoding.temperature}, at most {section.decoding.max_new_tokens} tokens, paired by {section.pairing}"
            f"{left_out}"
        )

    def run(self, work: StageWork, sink: EventSink) -> Mapping[str, Any]:
        """Make the pairs of this stage, or go on making them."""
        from preftune.app.generate import nothing_made, run_task, summary_lines

        started = time.monotonic()
        config = work.config
        folder = work.run.stage_folder(work.index, config.name)
        facts = {"name": config.name, "method": config.method, "start": work.start.name, "round": config.round}
        work.run.update_stage(work.index, {**facts, "status": "running"})
        made: MadePairs = run_task(
            work.recipe,
            _section(config),
            work.start,
            folder=folder / SAMPLES_FOLDER,
            out=folder / MADE_FILE,
            seed=seed_of(work.recipe.seed, config.round),
            sink=sink,
        )
        counts: dict[str, int] = dict(made.summary["left_out"])
        used = {key: made.summary[key] for key in ("prompts", "samples", "pairs")}
        write_json(folder / "data.json", {"counts": counts, "notes": {}, "used": used})
        for line in summary_lines(made.summary):
            sink(Noted("info", "pairs_made", f"stage {config.name}: {line}"))
        if made.num_pairs == 0:
            way_out = "look at the samples, raise the temperature, or loosen the guards"
            raise Blocked([Finding("blocker", "nothing_made", f"stage {config.name}: {nothing_made(made.summary)}", way_out)])
        summary = {**facts, "status": "succeeded", **used, "made": dict(made.summary), "seconds": time.monotonic() - started}
        work.run.update_stage(work.index, summary)
        return summary


def maker_judges(recipe: Recipe) -> list[tuple[str, str | dict[str, Any]]]:
    """The name of every generate stage and the judge of its pairs."""
    return [(stage.name, stage.generate.judge) for stage in recipe.stages if stage.generate is not None]


def _section(config: StageConfig) -> GenerateConfig:
    if config.generate is None:
        raise InputError(f"stage {config.name}: generate is missing; write prompts and judge")
    return config.generate
