"""Plan, train every stage, evaluate and report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from preftune.app.context import Context
from preftune.app.evaluate import EvaluationResult, evaluate_model
from preftune.app.probes import ProbeMode
from preftune.app.train import TrainResult, train
from preftune.core.errors import RecipeError
from preftune.core.events import EventSink, ignore
from preftune.core.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunResult:
    """A trained and evaluated run."""

    trained: TrainResult
    evaluated: EvaluationResult
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {"trained": self.trained.to_dict(), "evaluated": self.evaluated.to_dict(), "seconds": self.seconds}

    def summary(self) -> list[str]:
        """What a person reads at the end."""
        return [*self.evaluated.summary(), f"model {self.trained.model}", f"took {self.seconds:.0f} s"]


def run(
    recipe: Recipe, sink: EventSink = ignore, context: Context | None = None, *, probe: ProbeMode = "worthwhile"
) -> RunResult:
    """The whole job; the evaluation section is required, because a result without proof is none."""
    if recipe.evaluation is None:
        raise RecipeError("evaluation is missing: write evaluation: {prompts: FILE, judge: FILE}, or use `preftune train`")
    started = time.monotonic()
    place = context or Context.from_environment()
    trained = train(recipe, sink, place, probe=probe)
    evaluated = evaluate_model(recipe, trained, sink, place)
    return RunResult(trained, evaluated, time.monotonic() - started)
