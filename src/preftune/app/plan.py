"""Read, tokenise and check everything that a recipe names, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preftune.app.checks import check_disk, check_verdict_size, checkpoint_bytes, model_finding
from preftune.app.context import Context
from preftune.app.distribution import check_processes
from preftune.app.independence import check_judges
from preftune.app.probes import Probed, ProbeMode, ProbeTask, limit_or_machine
from preftune.app.probes import probe as run_probes
from preftune.app.runs import find_model
from preftune.app.stages.base import StageData, StartModel, kind_of
from preftune.app.tracking import check_tracking
from preftune.core.errors import Blocked, Finding, InputError, PreftuneError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.recipe import DataConfig, EvaluationConfig, ModelConfig, Recipe, StageConfig
from preftune.core.records import Example, Messages

DEFAULT_MAX_LENGTH = 2048
NOT_THERE = "a stage has no examples, or the run makes them"


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe with its data at hand and every finding about it."""

    recipe: Recipe
    stages: list[StageData]
    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    probed: Probed = field(default_factory=lambda: Probed(skipped="switched off"))

    @property
    def blockers(self) -> list[Finding]:
        """What would stop the run."""
        return [one for one in self.findings if one.level == "blocker"]

    def refused(self, *, is_resumed: bool = False) -> list[Finding]:
        """The blockers that count; a run that is resumed has part of its checkpoints already."""
        return [one for one in self.blockers if not (is_resumed and one.code == "disk_space")]

    def refuse(self, *, is_resumed: bool = False) -> None:
        """Raise Blocked if anything would stop the run."""
        found = self.refused(is_resumed=is_resumed)
        if found:
            raise Blocked(found)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "findings": [
                {"level": one.level, "code": one.code, "fact": one.fact, "way_out": one.way_out} for one in self.findings
            ],
            "facts": self.facts,
            "not_rehearsed": self.probed.skipped or None,
            "probes": [one.to_dict() for one in self.probed.stages],
            "stages": [
                kind_of(config).facts(config, data) for config, data in zip(self.recipe.stages, self.stages, strict=False)
            ],
        }

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = [f"model {self.recipe.model.name}" + "".join(f", {key} {value}" for key, value in self.facts.items())]
        for config, data in zip(self.recipe.stages, self.stages, strict=False):
            lines.append(kind_of(config).line(config, data))
        return lines + self.probed.summary([config.name for config in self.recipe.stages])


def plan(
    recipe: Recipe,
    sink: EventSink = ignore,
    *,
    probe: ProbeMode = "off",
    memory: int | None = None,
    context: Context | None = None,
) -> Plan:
    """Everything that can be known before training: the data as tokens, and findings with their ways out.

    Parameters
        probe: when to rehearse the run in a process of its own (``app.probes``).
        memory: bytes that the run may take; None for what the machine has.
        context: where probe results are kept.
    """
    from preftune.modeling.load import load_tokenizer, read_max_positions
    from preftune.training.model_files import check_model, num_parameters_of, weight_shapes

    findings: list[Finding] = []
    start = start_model(recipe, recipe.stages[0], recipe.model)
    try:
        tokenizer, max_positions = load_tokenizer(start), read_max_positions(start)
    except PreftuneError as error:
        return Plan(recipe, [], [model_finding(error)])
    findings += check_model(start.name)
    shapes = None if findings else weight_shapes(start.name)
    num_parameters = None if findings else num_parameters_of(start.name)
    model = StartModel(start.name, tokenizer, max_positions, num_parameters, shapes)
    stages: list[StageData] = []
    for index, config in enumerate(recipe.stages):
        sink(Progress(f"reading {config.name}", index, len(recipe.stages)))
        try:
            data = kind_of(config).read(recipe, config, model)
        except InputError as error:
            findings.append(
                Finding(
                    "blocker",
                    "unreadable_data",
                    f"stage {config.name}: {error}",
                    "name a readable file, `preftune check` says more",
                )
            )
            continue
        stages.append(data)
        findings += kind_of(config).check(config, data, model)
        findings += _check_reference(recipe, config)
    sink(Progress("reading", len(recipe.stages), len(recipe.stages)))
    findings += check_tracking(recipe)
    if recipe.evaluation is not None:
        findings += _check_evaluation(recipe.evaluation, stages)
        rows = {name for data in stages for example in data.train for name in example.provenance.judges}
        findings += check_judges(recipe, recipe.evaluation, rows)
    if shapes is not None:
        findings += check_disk(recipe, [_bytes_of(config, shapes, recipe.model.dtype) for config in recipe.stages])
    told, processes = check_processes(recipe, start.name, shapes, num_parameters)
    findings += told
    made = Plan(recipe, stages, findings, {"positions": max_positions, **processes})
    if made.blockers or any(not data.train for data in stages):
        return replace(made, probed=Probed(skipped="the blockers come first" if made.blockers else NOT_THERE))
    if processes:
        return replace(made, probed=Probed(skipped="several processes train it, and a rehearsal is of one"))
    probed = run_probes(task_of(made, context), probe, limit_or_machine(memory), sink)
    return replace(made, findings=[*findings, *probed.findings], probed=probed)


def task_of(made: Plan, context: Context | None = None) -> ProbeTask:
    """What the probes need of a plan: the stages' tokens, and the models that are there already."""
    from preftune.training.model_files import weight_shapes

    recipe = made.recipe
    starts = [
        start_model(recipe, config, recipe.model) if index == 0 or config.from_checkpoint is not None else None
        for index, config in enumerate(recipe.stages)
    ]
    data = [(one.train, one.select) for one in made.stages]
    shapes = weight_shapes(starts[0].name) if starts[0] is not None else None
    return ProbeTask(recipe, data, starts, shapes, context or Context.from_environment())


def start_model(recipe: Recipe, config: StageConfig, before: ModelConfig) -> ModelConfig:
    """The model that a stage starts from: its checkpoint if it names one, else the model before it."""
    if config.from_checkpoint is None:
        return before
    folder = find_model(config.from_checkpoint, Path(recipe.output))
    return before.model_copy(update={"name": str(folder), "revision": None})


def reference_model(recipe: Recipe, config: StageConfig) -> ModelConfig | None:
    """The model that a stage names as its reference; None where it is the one that the stage starts from."""
    given = None if config.reference is None else config.reference.model
    if given is None:
        return None
    name = given.rpartition("@")[0] or given
    is_here = any(path.is_dir() for path in (Path(name).expanduser(), Path(recipe.output) / name))
    if is_here or "@" in given:
        given = str(find_model(given, Path(recipe.output), "reference.model"))
    return recipe.model.model_copy(update={"name": given, "revision": None})


def limit_of(data: DataConfig | None, max_positions: int) -> int:
    """The length limit of a row in tokens."""
    asked = data.max_length if data is not None and data.max_length is not None else DEFAULT_MAX_LENGTH
    return min(asked, max_positions)


def read_stage(recipe: Recipe, config: StageConfig, tokenizer: Any, max_length: int) -> StageData:
    """Read, split and tokenise the data of a stage; every row left out is accounted for."""
    from preftune.core.records import expand_ranking
    from preftune.data.audit import audit
    from preftune.data.columns import Columns
    from preftune.data.contradictions import near_contradiction_facts
    from preftune.data.partners import with_partners
    from preftune.data.pipeline import read_examples
    from preftune.data.split import split_by_prompt
    from preftune.data.tokenize import tokenise
    from preftune.maths.losses.base import losses

    data = config.data
    if data is None:
        return StageData([], [], [], {}, {}, {}, {}, [], has_chat_rows=False)
    columns = Columns(data.columns, data.labels)
    how: dict[str, Any] = {"format": data.format, "style": data.style, "strict": data.strict, "columns": columns}
    read = read_examples(data.train, **how, limit=data.limit)
    examples, excluded, formats = read.examples, list(read.excluded), dict(read.formats)
    held_out: list[Example] = []
    if isinstance(data.select, str):
        other = read_examples([data.select], **how)
        held_out, excluded = other.examples, excluded + other.excluded
        formats.update(other.formats)
    elif data.select > 0:
        examples, held_out = split_by_prompt(examples, data.select, recipe.seed)
    examples, held_out = (
        [one for example in part for one in expand_ranking(example, data.rankings)] for part in (examples, held_out)
    )
    has_chat_rows = any(example.style == "chat" for example in examples)
    if has_chat_rows and not tokenizer.has_chat_template:
        return StageData([], [], excluded, {}, {}, formats, {}, [], has_chat_rows=True)
    loss = losses.build(config.method, config.loss)
    train, select = (
        tokenise(part, tokenizer, view=loss.view, max_length=max_length, too_long=data.too_long, needs=loss.needs)
        for part in (examples, held_out)
    )
    if "mismatched" in loss.needs:
        train, select = (
            replace(part, examples=with_partners(part.examples, max_length, train.examples)) for part in (train, select)
        )
    excluded += train.excluded + select.excluded
    counts = Counter(row.reason for row in excluded)
    notes = Counter(train.counts) + Counter(select.counts)
    return StageData(
        train=train.examples,
        select=select.examples,
        excluded=excluded,
        counts=dict(counts),
        notes={key: value for key, value in notes.items() if key not in counts and key != "kept"},
        formats=formats,
        audit={**audit(examples), "near_contradictions": near_contradiction_facts(examples)},
        prompts=[example.prompt_text for example in examples],
        has_chat_rows=has_chat_rows,
    )


def read_verdict_prompts(evaluation: EvaluationConfig) -> list[Messages]:
    """The prompts of the evaluation, at most ``limit`` of them, in the file's order."""
    from preftune.data.pipeline import read_prompts

    prompts = [row.prompt for row in read_prompts(evaluation.prompts)]
    return prompts if evaluation.limit is None else prompts[: evaluation.limit]


def _check_reference(recipe: Recipe, config: StageConfig) -> list[Finding]:
    """Blockers of a model that a stage names as its reference: that it is not there, or not whole."""
    from preftune.training.model_files import check_model

    try:
        other = reference_model(recipe, config)
    except PreftuneError as error:
        fact = f"stage {config.name}: {error}"
        return [Finding("blocker", "no_model", fact, "name a run, RUN@STEP, a model folder or a hub id")]
    found = [] if other is None else check_model(other.name)
    return [replace(one, fact=f"stage {config.name}: reference.model: {one.fact}") for one in found]


def _check_evaluation(evaluation: EvaluationConfig, stages: Sequence[StageData]) -> list[Finding]:
    """Blockers of the evaluation: unreadable prompts or judges, prompts that were trained on, a judge that made the pairs."""
    from preftune.data.pipeline import read_examples
    from preftune.data.split import leaks
    from preftune.judging.base import load_judge
    from preftune.judging.rules import RulesJudge
    from preftune.training.preflight import check_leaks

    findings: list[Finding] = []
    sets: list[tuple[str, list[str]]] = []
    try:
        prompts = ["\n".join(message.content for message in prompt) for prompt in read_verdict_prompts(evaluation)]
        judge = load_judge(evaluation.judge, Path.cwd())
        if evaluation.pairs_judge is not None:
            load_judge(evaluation.pairs_judge, Path.cwd())
        sets.append(("the verdict prompts", prompts))
        if evaluation.pairs is not None:
            pairs = read_examples([evaluation.pairs]).examples
            sets.append(("the held-out pairs", [example.prompt_text for example in pairs]))
    except PreftuneError as error:
        return [Finding("blocker", "unreadable_evaluation", str(error), "mend the evaluation section of the recipe")]
    findings += check_verdict_size(evaluation, len(prompts))
    for index, data in enumerate(stages):
        for name, held_out in sets:
            findings += check_leaks(leaks(data.prompts, held_out), f"stage {index + 1}'s training data", name)
    if isinstance(judge, RulesJudge):
        findings += [
            Finding(
                "warning", "judge_rewards_length", f"the judge of the result pays for length: {why}", "measure a rate instead"
            )
            for why in judge.rewards_length
        ]
    return findings


def _bytes_of(config: StageConfig, shapes: Any, precision: str) -> tuple[int, int]:
    return checkpoint_bytes(config, shapes, precision) if config.kind == "train" else (0, 0)
