"""What a stage is asked to do, where it stands, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preftune.core.recipe import ModelConfig, StageConfig
from preftune.core.records import TokenisedExample
from preftune.maths.losses.base import Loss
from preftune.modeling.load import LoadedModel
from preftune.training.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage, ready to run.

    Parameters
        config: the stage's section of the recipe.
        loaded: the model that the stage starts from, which is also its reference. Training changes it in place.
        train, select: tokenised examples in the view that the loss takes; select may be empty.
        folder: where metrics, checkpoints and the final model go.
        seed: of adapters, dropout and order.
        recipe_digest: what decides the stage; a checkpoint of another digest is not resumed.
        cache_folder: reference scores, shared between runs.
        resume: go on from the latest checkpoint in ``folder``, or start where there is none.
        reference: the model that is the reference instead of the one that the stage starts from.
        loss: an objective that was passed from Python, instead of the one that ``config.method`` names.
        ranks: the processes that train the stage together; the first one writes its folder.
        stop_reason: asked after every step; a sentence ends the stage there, well: the model is saved.
    """

    config: StageConfig
    loaded: LoadedModel
    train: list[TokenisedExample]
    select: list[TokenisedExample]
    folder: Path
    seed: int
    recipe_digest: str
    cache_folder: Path
    resume: bool = False
    reference: ModelConfig | None = None
    loss: Loss | None = None
    ranks: Ranks = ALONE
    stop_reason: Callable[[], str] = str


@dataclass(slots=True)
class TrainState:
    """Where a stage stands: optimiser steps done, tokens computed, seconds spent in earlier processes.

    loss_state: what a stateful loss remembers; empty before its first step and for every other loss.
    best_step, best_value: of the best evaluation so far, where the recipe asks for it. evals_without_gain: since then.
    num_evals: evaluations so far.
    ended: why the stage ends before its last step; empty while it goes on.
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    loss_state: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_value: float | None = None
    evals_without_gain: int = 0
    num_evals: int = 0
    ended: str = ""


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage gives back.

    Parameters
        folder: the stage's folder. final: a model folder that ``load_model`` takes.
        steps: optimiser steps of the whole stage.
        metrics: the last step's and, with the prefix ``eval_``, the last held-out ones.
        reference_forwards: completions that this process scored for the reference; 0 where all were cached.
        peak_memory_bytes: of the process on a CPU, of the allocator on a GPU.
        seconds: wall seconds of the loop, earlier processes included; the reference's scores not.
        resumed_from: the step that this process started at; 0 for a fresh start.
        kept_step: the step whose weights are in ``final``. best_value: of the metric that chose it, where one did.
        ended: why the stage ended before its last planned step, else empty.
    """

    folder: Path
    final: Path
    steps: int
    metrics: Mapping[str, float]
    reference_forwards: int
    peak_memory_bytes: int
    seconds: float
    resumed_from: int = 0
    kept_step: int = 0
    best_value: float | None = None
    ended: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
