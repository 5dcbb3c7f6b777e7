"""A run's events to the sinks that its recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from preftune.app.runs import RunFolder
from preftune.app.stages.base import StageData
from preftune.core.errors import Finding, Interrupted, RecipeError, UsageError
from preftune.core.events import Event, EventSink
from preftune.core.ids import digest_json
from preftune.core.recipe import Recipe
from preftune.tracking.base import DataFacts, RunFacts, Sink, Status, hide_secrets, sinks
from preftune.tracking.runner import CLOSE_SECONDS, Tracking, missing_of


def build_sinks(recipe: Recipe) -> dict[str, Sink]:
    """The sinks of a recipe by name; nothing is opened.

    Raises
        RecipeError: one that does not exist, or an option of one that does not, or is out of range.
    """
    built: dict[str, Sink] = {}
    for index, one in enumerate(recipe.tracking):
        try:
            built[one.name] = sinks.build(one.name, one.options)
        except UsageError as error:
            raise RecipeError(f"tracking.{index}: {error}") from None
    return built


def check_tracking(recipe: Recipe) -> list[Finding]:
    """A sink that the recipe asks for and that cannot work on this machine: a blocker, or a warning where it is not required."""
    required = {one.name for one in recipe.tracking if one.required}
    return [
        Finding("blocker", "missing_dependency", f"tracking: {name}: {what}", way_out)
        if name in required
        else Finding("warning", "tracking_unavailable", f"tracking: {name} is told nothing: {what}", way_out)
        for name, what, way_out in missing_of(build_sinks(recipe))
    ]


@contextmanager
def tracked(
    recipe: Recipe, run: RunFolder, stages: Sequence[StageData], tell: EventSink, close_seconds: float = CLOSE_SECONDS
) -> Iterator[EventSink]:
    """``tell`` and, behind it, every sink of the recipe; they are closed with what became of the run.

    One that is not required and cannot work here is left out: ``check_tracking`` said so.
    """
    required = {one.name for one in recipe.tracking if one.required}
    chosen = {name: sink for name, sink in build_sinks(recipe).items() if name in required or not sink.missing()}
    if not chosen:
        yield tell
        return
    tracking = Tracking(chosen, run_facts(recipe, run, stages), tell, close_seconds=close_seconds)

    def both(event: Event, /) -> None:
        tell(event)
        tracking(event)

    status: Status = "failed"
    try:
        yield both
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        tracking.close(status)


def run_facts(recipe: Recipe, run: RunFolder, stages: Sequence[StageData]) -> RunFacts:
    """What every sink is told of a run first."""
    data: list[DataFacts] = []
    for config, used in zip(recipe.stages, stages, strict=True):
        files = () if config.data is None else config.data.train
        select = config.data.select if config.data is not None and isinstance(config.data.select, str) else None
        for split, examples, names in (
            ("train", used.train, files),
            ("select", used.select, files if select is None else (select,)),
        ):
            if examples:
                digest = digest_json([one.example_id for one in examples])
                data.append(
                    DataFacts(config.name, "train" if split == "train" else "select", tuple(names), len(examples), digest)
                )
    names_of_stages = tuple(stage.name for stage in recipe.stages if stage.kind == "train")
    return RunFacts(run.path.name, run.path, hide_secrets(recipe.model_dump(mode="json")), names_of_stages, tuple(data))
