"""What is compared in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preftune.app.runs import RunFolder
from preftune.core.recipe import EvaluationConfig, ModelConfig, Recipe
from preftune.judging.base import Candidate


@dataclass(frozen=True, slots=True)
class Contest:
    """Two models, what they are compared on, and where the report goes.

    run: the run folder whose stages the report tells of; None where two folders are compared.
    policy_label, baseline_label: in the words of a sentence; the baseline's is derived from the run where it is empty.
    written: completions that are there already, by side (``policy``, ``baseline``) and prompt key; such a side loads no model.
    """

    recipe: Recipe
    evaluation: EvaluationConfig
    policy: ModelConfig
    baseline: ModelConfig
    folder: Path
    run: RunFolder | None
    written: Mapping[str, Mapping[str, Candidate]] = field(default_factory=dict)
    policy_label: str = "the tuned model"
    baseline_label: str = ""
