"""Prove how much better a model got: both models answer unseen prompts, a judge compares, a report says so."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.contest import Contest
from preftune.app.context import Context
from preftune.app.independence import refuse_same_judge
from preftune.app.plan import limit_of, read_stage
from preftune.app.recipes import load_recipe, make_recipe
from preftune.app.reporting import Findings, make_report
from preftune.app.rounds import compare_rounds
from preftune.app.runs import RUN_FILE, RunFolder, find_model
from preftune.app.stages.training import with_made_pairs
from preftune.app.train import TrainResult
from preftune.core.errors import RecipeError, UsageError
from preftune.core.events import EventSink, Progress, ignore
from preftune.core.files import write_text
from preftune.core.recipe import ModelConfig, Recipe
from preftune.core.records import TokenisedExample

PAIR_COLUMNS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from preftune.data.pipeline import PromptRow
    from preftune.evaluation.heldout import HeldOut
    from preftune.evaluation.rounds import RoundResult
    from preftune.evaluation.winrate import Completion, WinRate
    from preftune.modeling.load import LoadedModel


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The win rate under the judge of the result, the one under the pairs' judge, held-out accuracy, and the report."""

    win_rate: WinRate
    same_judge: WinRate | None
    held_out: HeldOut | None
    sentence: str
    report_json: Path
    report_markdown: Path
    report_html: Path
    seconds: float
    rounds: tuple[RoundResult, ...] = ()

    @property
    def verdict(self) -> str:
        """better, worse, equivalent or inconclusive."""
        return self.win_rate.verdict

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "win_rate": self.win_rate.to_dict(),
            "same_judge": None if self.same_judge is None else self.same_judge.to_dict(),
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "report_json": str(self.report_json),
            "report_markdown": str(self.report_markdown),
            "report_html": str(self.report_html),
            "seconds": self.seconds,
            "rounds": [one.to_dict() for one in self.rounds],
        }

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by name."""
        rate = self.win_rate
        found = {"win_rate": rate.rate, "win_rate/low": rate.interval.low, "win_rate/high": rate.interval.high,
                 "win_rate/prompts": float(rate.num_prompts)}  # fmt: skip
        if self.held_out is not None:
            found["held_out/accuracy"] = self.held_out.whole.accuracy
        return found

    def plot(self) -> Figure:
        """Win rate and held-out accuracy with their intervals as a matplotlib figure."""
        from preftune.app.plots import plot_rates

        rates = {"win rate": (self.win_rate.rate, self.win_rate.interval.low, self.win_rate.interval.high)}
        if self.same_judge is not None:
            same = self.same_judge
            rates["same judge as the pairs"] = (same.rate, same.interval.low, same.interval.high)
        if self.held_out is not None:
            whole = self.held_out.whole
            rates["held-out accuracy"] = (whole.accuracy, whole.interval.low, whole.interval.high)
        return plot_rates(rates)

    def _repr_html_(self) -> str:
        from preftune.app.plots import as_html

        return as_html(self.verdict, self.summary(), self.plot())

    def summary(self) -> list[str]:
        """What a person reads."""
        from preftune.evaluation.report import judge_sentences

        lines = [self.sentence, *judge_sentences(self.win_rate), *(one.sentence for one in self.rounds)]
        if self.same_judge is not None:
            lines.append(f"same judge as the pairs: {_rate_text(self.same_judge)}")
        if self.held_out is not None:
            whole = self.held_out.whole
            lines.append(
                f"held-out preference accuracy {whole.accuracy:.1%} [{whole.interval.low:.1%}, {whole.interval.high:.1%}] "
                f"on {whole.num_pairs} pairs, margin {whole.margin:+.3f}"
            )
        lines.append(f"report {self.report_html}")
        return lines


def evaluate_model(
    recipe: Recipe, trained: TrainResult, sink: EventSink = ignore, context: Context | None = None
) -> EvaluationResult:
    """Evaluate a run that was just trained, by its recipe's evaluation section."""
    if recipe.evaluation is None:
        raise RecipeError("evaluation is missing: write evaluation: {prompts: FILE, judge: FILE}")
    run = RunFolder(trained.run)
    contest = Contest(
        recipe,
        recipe.evaluation,
        policy=_model_config(recipe, str(trained.model)),
        baseline=_model_config(recipe, _baseline_of(recipe, trained.baseline)),
        folder=next_folder(run.path),
        run=run,
    )
    return hold(contest, sink, context or Context.from_environment())


def evaluate_run(
    model: str, overrides: Sequence[str], *, baseline: str | None, output: Path, sink: EventSink = ignore
) -> EvaluationResult:
    """``preftune eval``: a run by its recipe with overrides, or any model folder against ``baseline``."""
    run = _run_of(model, output)
    if run is not None:
        recipe = load_recipe(run.recipe_path, overrides)
    else:
        given: dict[str, Any] = {"model": "starter", "method": "sft"}
        recipe = make_recipe(_with_overrides(given, overrides))
    return _evaluate(model, recipe, run, baseline, output, sink)


def evaluate_with(
    model: str, keys: Mapping[str, Any], *, baseline: str | None, output: Path, sink: EventSink = ignore
) -> EvaluationResult:
    """``preftune.evaluate``: like ``evaluate_run``, with the keys of the evaluation section as a mapping."""
    run = _run_of(model, output)
    recipe = None if run is None else load_recipe(run.recipe_path)
    asked = make_recipe({"model": "starter", "method": "sft", "evaluation": _merged(recipe, keys)})
    chosen = asked if recipe is None else recipe.model_copy(update={"evaluation": asked.evaluation})
    return _evaluate(model, chosen, run, baseline, output, sink)


def hold(contest: Contest, sink: EventSink, context: Context) -> EvaluationResult:
    """Generate with both models, judge, score held-out pairs, and write the report."""
    from preftune.data.pipeline import read_prompts
    from preftune.evaluation.render import write_report
    from preftune.evaluation.showing import clean
    from preftune.evaluation.usage import count_use
    from preftune.evaluation.winrate import evaluate_pairs
    from preftune.judging.base import prepared_judge

    started = time.monotonic()
    evaluation = contest.evaluation
    refuse_same_judge(contest.recipe, evaluation)
    judge = prepared_judge(evaluation.judge, Path.cwd(), context.cache)
    pairs_judge = None
    if evaluation.pairs_judge is not None:
        pairs_judge = prepared_judge(evaluation.pairs_judge, Path.cwd(), context.cache)
    rows = read_prompts(evaluation.prompts, limit=evaluation.limit)
    before = time.monotonic()
    baseline, reference_logps = _answers(contest, contest.baseline, rows, "baseline", sink)
    policy, policy_logps = _answers(contest, contest.policy, rows, "policy", sink)
    timings = {"answers of both models": time.monotonic() - before}
    prompts = [row.prompt for row in rows]

    def told(done: int, total: int) -> None:
        sink(Progress("judging", done, total))

    win_rate = evaluate_pairs(
        prompts, policy, baseline, judge, margin=evaluation.margin, seed=contest.recipe.seed, on_progress=told
    )
    same = None
    if pairs_judge is not None:
        same = evaluate_pairs(prompts, policy, baseline, pairs_judge, margin=evaluation.margin, seed=contest.recipe.seed)
    rounds = compare_rounds(
        contest,
        {contest.policy.name: policy, contest.baseline.name: baseline},
        {(contest.policy.name, contest.baseline.name): win_rate},
        lambda config, role: _answers(contest, config, rows, role, sink)[0],
        lambda one, other: evaluate_pairs(prompts, one, other, judge, margin=evaluation.margin, seed=contest.recipe.seed),
    )
    uses = count_use(context.state, win_rate.prompts_hash, str(contest.folder))
    lines = (
        json.dumps({"prompt": [m.to_dict() for m in one.prompt], "policy": one.policy.text, "baseline": one.baseline.text,
                    "score": one.score}, ensure_ascii=False)
        for one in win_rate.judged
    )  # fmt: skip
    write_text(contest.folder / "completions.jsonl", "".join(clean(line) + "\n" for line in lines))
    held_out = _held_out(contest, policy_logps, reference_logps)
    report = make_report(contest, Findings(judge, win_rate, same, held_out, uses, timings, rounds))
    files = write_report(report, contest.folder)
    return EvaluationResult(
        win_rate, same, held_out, report.sentence, files.json, files.markdown, files.html, time.monotonic() - started, rounds
    )


def _evaluate(
    model: str, recipe: Recipe, run: RunFolder | None, baseline: str | None, output: Path, sink: EventSink
) -> EvaluationResult:
    if recipe.evaluation is None:
        raise UsageError("no evaluation section: add evaluation.prompts=FILE evaluation.judge=FILE")
    if run is None and baseline is None:
        raise UsageError(f"{model} is no run: name what to compare with, --baseline RUN or FOLDER")
    against = str(find_model(baseline, output)) if baseline is not None and baseline != "starter" else baseline
    if against is None:
        against = _baseline_of(recipe, str(run.read().get("baseline", recipe.model.name)) if run is not None else "")
    contest = Contest(
        recipe,
        recipe.evaluation,
        policy=_model_config(recipe, str(find_model(model, output))),
        baseline=_model_config(recipe, against),
        folder=next_folder(output if run is None else run.path),
        run=run,
    )
    return hold(contest, sink, Context.from_environment())


def _answers(
    contest: Contest, config: ModelConfig, rows: Sequence[PromptRow], role: str, sink: EventSink
) -> tuple[Sequence[Completion], dict[str, list[float]]]:
    """One model's completions of the prompts, and its log-probabilities of the held-out pairs; then it is let go."""
    if role in contest.written:
        from preftune.app.compare import written_answers

        return written_answers(contest, rows, role), {name: [] for name in (*PAIR_COLUMNS, "prompt")}
    from preftune.data.tokenize import prompt_ids_of
    from preftune.modeling.generate import generate
    from preftune.modeling.load import load_model
    from preftune.training.devices import choose_device, choose_precision

    precision = choose_precision(config.dtype, contest.recipe.stages[-1].adapter)
    loaded = load_model(config, precision=precision)
    loaded.model.to(choose_device())  # type: ignore[arg-type] # transformers' stub of .to hides torch's
    prompts = [prompt_ids_of(row.prompt, loaded.tokenizer, style=row.style, tools=row.tools) for row in rows]

    def told(done: int, total: int) -> None:
        sink(Progress(f"writing with the {role}", done, total))

    written = generate(loaded.model, loaded.tokenizer, prompts, contest.evaluation.decoding, contest.recipe.seed, told)
    return written, _pair_logps(contest, loaded)


def _held_out_pairs(contest: Contest, loaded: LoadedModel) -> list[TokenisedExample]:
    """Held-out pairs: those that the evaluation names, else what the last stage on pairs did not train on."""
    from preftune.maths.losses.base import losses

    recipe, run = contest.recipe, contest.run
    configs = [stage if run is None else with_made_pairs(recipe, index, run) for index, stage in enumerate(recipe.stages)]
    stages = [
        stage
        for stage in configs
        if stage.kind == "train" and stage.data is not None and losses.factory(stage.method).view == "pairs"
    ]
    if not stages:
        return []
    stage = stages[-1]
    data = stage.data
    if contest.evaluation.pairs is not None and data is not None:
        stage = stage.model_copy(update={"data": data.model_copy(update={"train": (contest.evaluation.pairs,), "select": 0.0})})
        return read_stage(contest.recipe, stage, loaded.tokenizer, limit_of(stage.data, loaded.max_positions)).train
    return read_stage(contest.recipe, stage, loaded.tokenizer, limit_of(data, loaded.max_positions)).select


def _pair_logps(contest: Contest, loaded: LoadedModel) -> dict[str, list[float]]:
    """Summed log-probabilities of held-out pairs under one model, with lengths and prompts, pair by pair."""
    import torch

    from preftune.data.pack import pack_step
    from preftune.modeling.forward import Scorer

    has_pairs = contest.run is not None or contest.evaluation.pairs is not None
    examples = [one for one in _held_out_pairs(contest, loaded) if not one.is_tie] if has_pairs else []
    columns: dict[str, dict[str, float]] = {name: {} for name in PAIR_COLUMNS}
    if examples:
        scorer = Scorer(loaded.model)
        with torch.no_grad():
            for pack in pack_step(examples, contest.recipe.stages[-1].tokens_per_pack):
                scored = scorer.sequence_logps(pack)
                for index, example in enumerate(pack.examples):
                    for role, place in (("chosen", 2 * index), ("rejected", 2 * index + 1)):
                        columns[role][example.example_id] = float(scored.logps[place])
                        columns[f"{role}_tokens"][example.example_id] = float(scored.num_tokens[place])
    order = [example.example_id for example in examples]
    return {name: [values[one] for one in order] for name, values in columns.items()} | {
        "prompt": [float(hash(example.prompt_ids)) for example in examples]
    }


def _held_out(contest: Contest, policy: dict[str, list[float]], reference: dict[str, list[float]]) -> HeldOut | None:
    from preftune.evaluation.heldout import PairScores, held_out_accuracy

    if not policy["chosen"]:
        return None
    beta = float(contest.recipe.stages[-1].loss.get("beta", 0.1))
    scores = PairScores(
        policy["chosen"], policy["rejected"], reference["chosen"], reference["rejected"],
        [int(one) for one in policy["chosen_tokens"]], [int(one) for one in policy["rejected_tokens"]], policy["prompt"],
    )  # fmt: skip
    return held_out_accuracy(scores, beta=beta, seed=contest.recipe.seed)


def _rate_text(rate: WinRate) -> str:
    return f"{rate.rate:.1%} [{rate.interval.low:.1%}, {rate.interval.high:.1%}]"


def _model_config(recipe: Recipe, name: str) -> ModelConfig:
    revision = recipe.model.revision if name == recipe.model.name else None
    return recipe.model.model_copy(update={"name": name, "revision": revision})


def _baseline_of(recipe: Recipe, start_of_last_stage: str) -> str:
    evaluation = recipe.evaluation
    return recipe.model.name if evaluation is not None and evaluation.baseline == "base" else start_of_last_stage


def _run_of(model: str, output: Path) -> RunFolder | None:
    """The run that a model's name belongs to: the run itself, one of its steps, or a folder inside it."""
    name = model.rpartition("@")[0] if "@" in model else model
    for path in (Path(name).expanduser(), output / name):
        for folder in (path, *path.parents):
            if (folder / RUN_FILE).is_file():
                return RunFolder(folder.resolve())
    return None


def next_folder(parent: Path, name: str = "evaluation") -> Path:
    """A new folder below ``parent`` for a report."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def _merged(recipe: Recipe | None, keys: Mapping[str, Any]) -> dict[str, Any]:
    known = {} if recipe is None or recipe.evaluation is None else recipe.evaluation.model_dump(mode="json", exclude_none=True)
    return {**known, **{key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}}


def _with_overrides(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    from preftune.app.recipes import apply_override

    for override in overrides:
        apply_override(given, override)
    return given
