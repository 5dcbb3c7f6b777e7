"""What is compared in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from preftune.app.runs import RunFolder
from preftune.core.recipe import EvaluationConfig, ModelConfig, Recipe


@dataclass(frozen=True, slots=True)
class Contest:
    """Two models, what they are compared on, and where the report goes.

    run: the run folder whose stages the report tells of; None where two folders are compared.
    """

    recipe: Recipe
    evaluation: EvaluationConfig
    policy: ModelConfig
    baseline: ModelConfig
    folder: Path
    run: RunFolder | None
