"""A grid of settings over one recipe: shared stages trained once, one cached reference, drift against win rate."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.context import Context
from preftune.app.recipes import load_recipe, read_mapping
from preftune.app.runs import RunFolder, folder_name
from preftune.app.stages.training import is_pending
from preftune.core.errors import Blocked, Interrupted, PreftuneError, RecipeError, UsageError
from preftune.core.events import EventSink, Noted, Progress, ignore
from preftune.core.files import append_jsonl, read_json, read_jsonl, write_json
from preftune.core.ids import digest_json
from preftune.core.recipe import Recipe

if TYPE_CHECKING:
    from preftune.app.evaluate import EvaluationResult
    from preftune.app.train import TrainResult
    from preftune.evaluation.sweep import SweepPoint, SweepReport

MAX_POINTS = 256
DRIFT = ("kl", "eval_kl")


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A sweep that ended: its report and where it was written."""

    folder: Path
    report: SweepReport
    html: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"folder": str(self.folder), "html": str(self.html), "seconds": self.seconds, **self.report.to_dict()}

    def summary(self) -> list[str]:
        """What a person reads."""
        lines = []
        for point in self.report.points:
            if point.rate is None or point.interval is None:
                lines.append(f"{point.label}: failed: {point.error}")
                continue
            drift = "drift not measured" if point.drift is None else f"drift {point.drift:.3g} nats"
            lines.append(
                f"{point.label}: win rate {point.rate:.1%} [{point.interval.low:.1%}, {point.interval.high:.1%}], {drift}, "
                f"{point.reference_forwards} reference forwards"
            )
        return [*lines, self.report.sentence, f"report {self.html}", f"took {self.seconds:.0f} s"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Every point of a sweep: its settings and its recipe. num_shared: leading stages that all points have in common."""

    points: tuple[tuple[dict[str, Any], Recipe], ...]
    num_shared: int

    @property
    def first(self) -> Recipe:
        """The recipe of the first point."""
        return self.points[0][1]


def sweep(
    path: Path, axes: Sequence[str], overrides: Sequence[str] = (), sink: EventSink = ignore, context: Context | None = None
) -> SweepResult:
    """Train and evaluate every point of a grid in a new folder.

    Parameters
        axes: ``key=v1,v2,...`` with a recipe's dotted keys; none means the recipe's own ``sweep`` section.
        overrides: ``key=value`` for all points.

    Raises
        RecipeError: no axis, one without values, or a grid of more than MAX_POINTS points.
        Blocked: preflight refuses a point; nothing was trained.
        Interrupted: stopped; ``resume_sweep`` goes on.
    """
    grid = make_grid(path, axes, overrides)
    from preftune.app.plan import plan

    plan(grid.first, sink).refuse()
    now = datetime.datetime.now(datetime.UTC)
    folder = Path(grid.first.output).resolve() / folder_name(f"sweep-{grid.first.name or 'recipe'}", now)
    folder.mkdir(parents=True)
    asked = {"recipe": str(path.resolve()), "axes": list(axes), "overrides": list(overrides), "digest": _digest(grid)}
    write_json(folder / "grid.json", {**asked, "created": now.isoformat(timespec="seconds")})
    return _go(grid, folder, sink, context or Context.from_environment())


def resume_sweep(
    given: str, sink: EventSink = ignore, context: Context | None = None, output: Path = Path("runs")
) -> SweepResult:
    """Go on with a sweep that was stopped; points that are done are not repeated."""
    found = [one for one in (Path(given).expanduser(), output / given) if (one / "grid.json").is_file()]
    if not found:
        raise UsageError(f"no sweep {given!r}: name the folder that `preftune sweep` printed")
    asked = read_json(found[0] / "grid.json")
    grid = make_grid(Path(asked["recipe"]), asked["axes"], asked["overrides"])
    if _digest(grid) != asked["digest"]:
        raise RecipeError(f"{asked['recipe']} has changed since {found[0]} was started; restore it, or start a new sweep")
    return _go(grid, found[0].resolve(), sink, context or Context.from_environment())


def make_grid(path: Path, axes: Sequence[str], overrides: Sequence[str] = ()) -> Grid:
    """The points of a grid, each with its checked recipe; an evaluation section is required."""
    from preftune.evaluation.sweep import SweepPoint

    values = dict(_axis(one) for one in axes) or _own_axes(path)
    if not values:
        raise RecipeError(f"{path}: nothing to sweep: write --grid beta=0.05,0.1 or a section sweep: {{beta: [0.05, 0.1]}}")
    count = 1
    for key, choices in values.items():
        if not choices:
            raise RecipeError(f"sweep: {key} has no values; write {key}=VALUE,VALUE")
        if len({json.dumps(choice, default=str) for choice in choices}) < len(choices):
            raise RecipeError(f"sweep: {key} has a value twice: {', '.join(map(str, choices))}")
        count *= len(choices)
    if count > MAX_POINTS:
        raise RecipeError(f"sweep: {count} points, and at most {MAX_POINTS} make sense; drop values")
    points = []
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        points.append((settings, load_recipe(path, [*overrides, *given])))
    first = points[0][1]
    for (one, recipe), (other, another) in itertools.combinations(points, 2):
        if recipe == another:
            same = f"{SweepPoint(one, '', 'done').label} and {SweepPoint(other, '', 'done').label} are the same recipe"
            raise RecipeError(f"sweep: {same}: a stage's own key goes before the top level's; write stages.N.KEY=..., N from 0")
    if first.evaluation is None:
        raise RecipeError(
            f"{path}: evaluation is missing; a sweep compares win rates: write evaluation: {{prompts: FILE, judge: FILE}}"
        )
    return Grid(tuple(points), _num_shared([recipe for _, recipe in points]))


def _axis(given: str) -> tuple[str, list[Any]]:
    import yaml

    key, sign, text = given.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"grid {given!r}: write KEY=VALUE,VALUE, such as beta=0.05,0.1")
    return key.strip(), [_number(yaml.safe_load(one)) for one in text.strip("[] ").split(",") if one.strip()]


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _own_axes(path: Path) -> dict[str, list[Any]]:
    own = read_mapping(path).get("sweep") or {}
    if not isinstance(own, Mapping) or not all(isinstance(one, list) for one in own.values()):
        raise RecipeError(f"{path}: sweep: write a mapping of keys to lists, such as {{beta: [0.05, 0.1]}}")
    return {str(key): list(one) for key, one in own.items()}


def _num_shared(recipes: Sequence[Recipe]) -> int:
    """Leading stages that are equal in every point; the last stage always belongs to the point."""
    first = recipes[0]
    if any(one.model != first.model or one.seed != first.seed for one in recipes):
        return 0
    count = 0
    for stages in zip(*(one.stages for one in recipes), strict=False):
        if any(stage != stages[0] for stage in stages):
            break
        count += 1
    return _with_makers(first, min(count, min(len(one.stages) for one in recipes) - 1))


def _with_makers(recipe: Recipe, count: int) -> int:
    """At most ``count`` leading stages, such that no generate stage is parted from the one that trains on its pairs."""
    makers = [index for index, stage in enumerate(recipe.stages) if stage.kind == "generate"]
    for index, stage in enumerate(recipe.stages):
        if index >= count and is_pending(stage):
            count = min(count, max(maker for maker in makers if maker < index))
    return count


def _digest(grid: Grid) -> str:
    return digest_json([[settings, recipe.model_dump(mode="json")] for settings, recipe in grid.points])


def _go(grid: Grid, folder: Path, sink: EventSink, context: Context) -> SweepResult:
    from preftune.evaluation.sweep import SweepReport, write_sweep

    started = time.monotonic()
    start = _train_shared(grid, folder, sink, context)
    kept = {row["key"]: row["point"] for row in read_jsonl(folder / "points.jsonl")} if (folder / "points.jsonl").exists() else {}
    points: list[SweepPoint] = []
    facts: dict[str, Any] = {"judge": "", "baseline": "its reference", "num_prompts": 0}
    for index, (settings, recipe) in enumerate(grid.points):
        sink(Progress("sweep", index, len(grid.points)))
        key = digest_json(settings)
        if key not in kept:
            point, found = _visit(_from(recipe, grid.num_shared, start, folder, index), settings, len(grid.points), sink, context)
            kept[key] = {**point.to_dict(), "facts": found}
            append_jsonl(folder / "points.jsonl", {"key": key, "point": kept[key]})
        facts = {**facts, **kept[key]["facts"]}
        points.append(_point(kept[key]))
    sink(Progress("sweep", len(grid.points), len(grid.points)))
    created = str(read_json(folder / "grid.json")["created"])
    report = SweepReport(
        folder.name, created, str(facts["baseline"]), str(facts["judge"]), int(facts["num_prompts"]), tuple(points)
    )
    files = write_sweep(report, folder)
    if not report.done:
        raise PreftuneError(f"every point of the sweep failed, the first: {points[0].error}; see {files.markdown}")
    return SweepResult(folder, report, files.html, time.monotonic() - started)


def _train_shared(grid: Grid, folder: Path, sink: EventSink, context: Context) -> str | None:
    """Train the stages that all points share, once; the final model's folder, or None where they share none."""
    from preftune.app.train import resume_run, train

    if grid.num_shared == 0:
        return None
    shared = grid.first.model_copy(
        update={
            "stages": grid.first.stages[: grid.num_shared],
            "evaluation": None,
            "output": str(folder / "shared"),
            "name": "shared",
        }
    )
    started = _only_run(folder / "shared")
    if started is not None:
        return str(resume_run(str(started), sink, context).model)
    return str(train(shared, sink, context).model)


def _from(recipe: Recipe, num_shared: int, start: str | None, folder: Path, index: int) -> Recipe:
    """A point's own stages, starting from the shared ones, with a folder of its own."""
    stages = recipe.stages[num_shared:]
    if start is not None and stages[0].from_checkpoint is None:
        stages = (stages[0].model_copy(update={"from_checkpoint": start}), *stages[1:])
    return recipe.model_copy(update={"stages": stages, "output": str(folder / "points" / str(index + 1)), "name": "point"})


def _visit(
    recipe: Recipe, settings: dict[str, Any], num_points: int, sink: EventSink, context: Context
) -> tuple[SweepPoint, dict[str, Any]]:
    """Train and evaluate one point, or go on with it; an error of its own is kept and the sweep goes on."""
    from preftune.app.evaluate import evaluate_model
    from preftune.app.train import resume_run, train
    from preftune.evaluation.sweep import SweepPoint

    started = time.monotonic()
    label = SweepPoint(settings, "", "done").label
    sink(Noted("info", "sweep_point", label))
    folder = Path(recipe.output)
    before = _only_run(folder)
    try:
        trained = train(recipe, sink, context) if before is None else resume_run(str(before), sink, context)
        result = evaluate_model(recipe, trained, sink, context)
    except Interrupted:
        raise
    except Blocked:
        raise
    except PreftuneError as error:
        sink(Noted("warning", "sweep_point_failed", f"{label}: {error}"))
        run = _only_run(folder)
        text = " ".join(str(error).split())
        return SweepPoint(settings, "" if run is None else str(run), "failed", text, seconds=time.monotonic() - started), {}
    return _evaluated(settings, trained, result, num_points, recipe.seed, time.monotonic() - started), {
        "judge": result.win_rate.judge_label,
        "num_prompts": result.win_rate.num_prompts,
    }


def _evaluated(
    settings: dict[str, Any], trained: TrainResult, result: EvaluationResult, num_points: int, seed: int, seconds: float
) -> SweepPoint:
    from preftune.evaluation.sweep import SweepPoint, joint_interval

    metrics = trained.stages[-1]["metrics"]
    drift = next((float(metrics[name]) for name in DRIFT if name in metrics), None)
    return SweepPoint(
        settings,
        str(trained.run),
        "done",
        rate=result.win_rate.rate,
        interval=result.win_rate.interval,
        joint=joint_interval(result.win_rate, num_points, seed=seed),
        verdict=result.verdict,
        drift=drift,
        length_ratio=result.win_rate.length_ratio,
        held_out={name: value for name, value in metrics.items() if name.startswith("eval_")},
        reference_forwards=sum(int(stage.get("reference_forwards", 0)) for stage in trained.stages),
        seconds=seconds,
    )


def _point(row: Mapping[str, Any]) -> SweepPoint:
    from preftune.evaluation.sweep import SweepPoint
    from preftune.statistics.intervals import Interval

    given = {key: value for key, value in row.items() if key not in {"label", "facts"}}
    for name in ("interval", "joint"):
        if given[name] is not None:
            given[name] = Interval(**given[name])
    return SweepPoint(**given)


def _only_run(folder: Path) -> Path | None:
    """The run that an earlier process began in a point's folder."""
    from preftune.app.runs import list_runs

    found: list[RunFolder] = list_runs(folder)
    return found[-1].path if found else None
