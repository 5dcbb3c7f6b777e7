"""Train every stage of a recipe; each starts from, and is anchored to, the one before."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.context import Context
from preftune.app.holding import hold
from preftune.app.plan import Plan, plan, reference_model, start_model
from preftune.app.probes import ProbeMode, ask_model, is_switched_off
from preftune.app.recipes import load_recipe, recipe_digest, save_recipe
from preftune.app.runs import RunFolder
from preftune.app.series import Series, series_of
from preftune.app.stages.base import StageWork, kind_of, say_and_refuse
from preftune.app.tracking import tracked
from preftune.core.errors import Interrupted, PreftuneError, UsageError
from preftune.core.events import Event, EventSink, Noted, ignore
from preftune.core.files import append_jsonl, read_jsonl, write_bytes, write_json
from preftune.core.ids import digest_json
from preftune.core.launch import Launch
from preftune.core.recipe import Recipe
from preftune.core.rounds import seed_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from preftune.training.ranks import Ranks


NOT_PROBED = (
    "the run is not probed (--no-probe, no_probe: true or PREFTUNE_PROBE=off): nobody asked whether the model can do the task, "
    "nor what memory and time the run takes"
)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A trained run: its folder, the final model, and what each stage reached."""

    run: Path
    model: Path
    baseline: str
    stages: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"run": str(self.run), "model": str(self.model), "baseline": self.baseline, "stages": self.stages}

    @property
    def metrics(self) -> dict[str, dict[str, Series]]:
        """Every metric of every stage over its steps: ``result.metrics["dpo"]["kl"].values``."""
        return {name: series_of(rows) for name, rows in self._rows().items()}

    def plot(self) -> Figure:
        """The curves of every stage as a matplotlib figure."""
        from preftune.app.plots import plot_stages

        return plot_stages(self.metrics)

    def _repr_html_(self) -> str:
        from preftune.app.plots import as_html

        lines = [f"{stage['name']}: {stage['status']}, {stage.get('steps', 0)} steps" for stage in self.stages]
        return as_html(str(self.run.name), [*lines, f"model {self.model}"], self.plot())

    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        folders = (
            (stage["name"], RunFolder(self.run).stage_folder(index, stage["name"])) for index, stage in enumerate(self.stages)
        )
        return {name: read_jsonl(folder / "metrics.jsonl") for name, folder in folders}


def prepare_process() -> None:
    """Settings of a process that preftune itself started to train: the allocator, quiet libraries (docs/adr/0009)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from preftune.training.devices import set_allocator

    if os.environ.get("PREFTUNE_ALLOCATOR", "on") != "off":
        set_allocator()


def train(
    recipe: Recipe,
    sink: EventSink = ignore,
    context: Context | None = None,
    *,
    folder: Path | None = None,
    probe: ProbeMode = "worthwhile",
) -> TrainResult:
    """Plan and train a recipe in a new run folder: ``folder``, or one below the recipe's output.

    Parameters
        probe: when to rehearse the run first; ``off`` also leaves out the question whether the model can do the task.

    Raises
        Blocked: preflight refuses; nothing was written.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written, ``resume_run`` goes on from it.
    """
    from preftune.training.ranks import check_shared, joined

    place = context or Context.from_environment()
    with joined(Launch.from_environment()) as ranks:
        made = plan(recipe, sink if ranks.is_first else ignore, probe=probe, context=place)
        _refuse_together(made, ranks)
        if ranks.is_first:
            run = RunFolder.create(Path(recipe.output), recipe.name or "run", at=folder)
            run.update({"is_probed": not is_switched_off(probe)})
            save_recipe(recipe, run.recipe_path)
        run = RunFolder(Path(ranks.from_first(str(run.path) if ranks.is_first else "")), is_ours=ranks.is_first)
        check_shared(ranks, run.path, place.cache)
        return _train_stages(made, run, sink, place, ranks)


def resume_run(
    given: str,
    sink: EventSink = ignore,
    context: Context | None = None,
    output: Path = Path("runs"),
    *,
    no_probe: bool = False,
) -> TrainResult:
    """Go on with a run that was stopped, from its last whole checkpoint; stages that finished are not repeated.

    Parameters
        no_probe: a model that was refused because it cannot do the task is let go on; without it, it is refused again.
    """
    from preftune.training.ranks import check_shared, joined

    place = context or Context.from_environment()
    with joined(Launch.from_environment()) as ranks:
        run = replace(RunFolder.open(given, output), is_ours=ranks.is_first)
        recipe = load_recipe(run.recipe_path)
        made = plan(recipe, sink if ranks.is_first else ignore)
        _refuse_together(made, ranks, is_resumed=True)
        check_shared(ranks, run.path, place.cache)
        if is_switched_off("off" if no_probe else "worthwhile"):
            run.update({"is_probed": False})
        return _train_stages(made, run, sink, place, ranks, is_resumed=True)


def _refuse_together(made: Plan, ranks: Ranks, *, is_resumed: bool = False) -> None:
    """Raise Blocked where anything would stop the run, here or on another rank."""
    blocked = ranks.any(is_so=bool(made.refused(is_resumed=is_resumed)))
    made.refuse(is_resumed=is_resumed)
    if blocked:
        raise UsageError(
            f"another process refuses the run and rank {ranks.rank} does not: see what it says; "
            "model and data must be the same on all hosts"
        )


def _train_stages(
    made: Plan,
    run: RunFolder,
    sink: EventSink,
    context: Context,
    ranks: Ranks,
    *,
    is_resumed: bool = False,
) -> TrainResult:
    """Train stage after stage; a model is asked first whether it can do the task, where no probe did and the run is probed."""

    def keep(event: Event, /) -> None:
        if isinstance(event, Noted):
            append_jsonl(run.path / "events.jsonl", {"level": event.level, "code": event.code, "message": event.message})
        sink(event)

    if not ranks.is_first:  # the first process speaks, asks the callbacks and writes
        return _train_held(made, run, ignore, context, ranks, is_resumed=is_resumed)
    with hold(run.path, context.cache), tracked(made.recipe, run, made.stages, keep) as told:
        tell = context.hooks.telling(told)
        return _train_held(made, run, tell, context, ranks, is_resumed=is_resumed)


def _train_held(made: Plan, run: RunFolder, tell: EventSink, context: Context, ranks: Ranks, *, is_resumed: bool) -> TrainResult:
    is_probed = ranks.from_first(run.read().get("is_probed") if run.is_ours else None)  # None: of a run from before that was kept
    said = read_jsonl(run.path / "events.jsonl")
    if is_probed is False and not any(row["code"] == "not_probed" for row in said):
        tell(Noted("info", "not_probed", NOT_PROBED))
    for finding in made.findings:
        tell(Noted(finding.level, finding.code, f"{finding.fact}; {finding.way_out}"))
    excluded = [
        _json_line({"stage": config.name, **row.to_dict()})
        for config, data in zip(made.recipe.stages, made.stages, strict=True)
        for row in data.excluded
    ]
    if run.is_ours:
        write_bytes(run.path / "excluded.jsonl", b"".join(excluded))
    run.update({"status": "running", "error": None})
    before = made.recipe.model
    baseline = before.name
    summaries: list[dict[str, Any]] = []
    records = ranks.from_first(run.read()["stages"] if run.is_ours else [])
    try:
        for index, (config, data) in enumerate(zip(made.recipe.stages, made.stages, strict=True)):
            start = start_model(made.recipe, config, before)
            baseline = start.name if config.kind == "train" else baseline
            record = records[index] if index < len(records) else {}
            if record.get("status") == "succeeded":
                summary = record
            else:
                probed = made.probed.stages[index] if index < len(made.probed.stages) else None
                is_begun = any(run.stage_folder(index, config.name).glob("checkpoints/*/manifest.json"))
                is_open = is_probed and not is_begun and (probed is None or probed.competence is None)
                work = StageWork(made.recipe, index, data, start, run, context, is_resumed, is_open, ranks=ranks)
                summary = dict(kind_of(config).run(work, tell))
            summaries.append(summary)
            before = start
            if "final" in summary:  # a stage that trains nothing leaves the model as it is
                before = start.model_copy(update={"name": str(run.path / summary["final"]), "revision": None})
    except Interrupted:
        run.stop("interrupted")
        raise
    except BaseException as error:
        run.stop("failed", error=_one_line(error))
        raise
    finals = [summary["final"] for summary in summaries if "final" in summary]
    run.update({"status": "succeeded", "model": finals[-1] if finals else None, "baseline": baseline})
    return TrainResult(run.path, Path(before.name), baseline, summaries)


def train_stage(work: StageWork, sink: EventSink) -> dict[str, Any]:
    """Train one stage and keep its record in ``run.json``."""
    from preftune.modeling.load import load_model
    from preftune.training.devices import choose_precision
    from preftune.training.loop import run_stage
    from preftune.training.passed import identity_of, name_of
    from preftune.training.state import StagePlan

    recipe, index, run, data, start = work.recipe, work.index, work.run, work.data, work.start
    config = work.config
    folder = run.stage_folder(index, config.name)
    loss, digest = work.context.hooks.loss_for(config), recipe_digest(recipe, config)
    facts = {"name": config.name, "method": config.method, "adapter": config.adapter, "start": start.name}
    if loss is not None:
        facts["passed_loss"] = name_of(loss)
        digest = digest_json([digest, identity_of(loss)])
    run.update_stage(index, {**facts, "status": "running"})
    if run.is_ours:
        read = {"counts": data.counts, "notes": data.notes, "formats": data.formats, "audit": data.audit}
        write_json(folder / "data.json", {**read, "train": len(data.train), "select": len(data.select)})
    precision = choose_precision(start.dtype, config.adapter)
    loaded = load_model(start, precision=precision)
    if work.is_asked:
        say_and_refuse(ask_model(config, loaded, data.train), sink)
    result = run_stage(
        StagePlan(
            config=config,
            loaded=loaded,
            train=data.train,
            select=data.select,
            folder=folder,
            seed=seed_of(recipe.seed, config.round),
            recipe_digest=digest,
            cache_folder=work.context.reference_cache,
            resume=work.is_resumed,
            reference=reference_model(recipe, config),
            loss=loss,
            ranks=work.ranks,
            stop_reason=work.context.hooks.stop_reason,
        ),
        sink,
    )
    summary = {
        **facts,
        "status": "succeeded",
        "final": str(result.final.relative_to(run.path)),
        "steps": result.steps,
        "kept_step": result.kept_step,
        "best_value": result.best_value,
        "ended": result.ended,
        "metrics": dict(result.metrics),
        "precision": precision,
        "reference_forwards": result.reference_forwards,
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": result.seconds,
    }
    run.update_stage(index, summary)
    return summary


def _json_line(row: dict[str, Any]) -> bytes:
    import json

    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, PreftuneError) else f"{type(error).__name__}: {text}"
