"""``preftune reference``: score what a recipe's stages will ask of their references, and train nothing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.app.context import Context
from preftune.app.plan import plan, reference_model, start_model
from preftune.app.stages.base import StageData
from preftune.core.events import EventSink, ignore
from preftune.core.recipe import ModelConfig, Recipe, StageConfig
from preftune.core.rounds import seed_of

WAITS = "starts from what the stage before it trains; its reference is scored when that has run"
MADE_LATER = "its pairs are made by the run"
NEEDS_NONE = "compares with no cached reference"


@dataclass(frozen=True, slots=True)
class StageScores:
    """The cached reference of one stage.

    Parameters
        hits: completions that the cache held before. misses: completions that were scored now. num_bytes: of all that the
            cache holds of this reference, other runs' included. reason: why nothing was scored, empty where it was.
        identity: digest of weights, precision, kernel and versions: the folder's name in the cache.
    """

    stage: str
    hits: int = 0
    misses: int = 0
    num_bytes: int = 0
    identity: str = ""
    reason: str = ""

    @property
    def line(self) -> str:
        """In a sentence."""
        if self.reason:
            return f"stage {self.stage}: {self.reason}"
        return (
            f"stage {self.stage}: {self.hits + self.misses} completions, {self.hits} held, {self.misses} scored now; "
            f"the cache of reference {self.identity[:12]} takes {self.num_bytes / 1e6:.2f} MB"
        )


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """What was scored of a recipe, and where it is kept."""

    folder: Path
    stages: tuple[StageScores, ...]
    seconds: float

    @property
    def hits(self) -> int:
        """Completions that the cache held before."""
        return sum(one.hits for one in self.stages)

    @property
    def misses(self) -> int:
        """Completions that were scored now."""
        return sum(one.misses for one in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        totals = {"hits": self.hits, "misses": self.misses, "seconds": self.seconds}
        return {"folder": str(self.folder), **totals, "stages": [asdict(one) for one in self.stages]}

    def summary(self) -> list[str]:
        """What a person reads."""
        return [*(one.line for one in self.stages), f"kept in {self.folder}, shared by all runs; took {self.seconds:.0f} s"]


def score_references(recipe: Recipe, sink: EventSink = ignore, context: Context | None = None) -> ReferenceResult:
    """Fill the reference cache for every stage whose start is there already.

    A run of the recipe, and of any other with the same model and rows, then finds every score. What an interrupted call
    has scored is kept, and several may work at once.

    Raises
        Blocked: preflight refuses the recipe.
        Interrupted: SIGINT or SIGTERM; call again to go on.
    """
    started, place = time.monotonic(), context or Context.from_environment()
    made = plan(recipe, sink)
    made.refuse()
    found: list[StageScores] = []
    before: ModelConfig | None = recipe.model
    for config, data in zip(made.recipe.stages, made.stages, strict=True):
        known = before if config.from_checkpoint is None else start_model(recipe, config, recipe.model)
        found.append(_score(recipe, config, data, known, place, sink))
        before = known if config.kind == "generate" else None
    return ReferenceResult(place.reference_cache, tuple(found), time.monotonic() - started)


def _score(
    recipe: Recipe, config: StageConfig, data: StageData, start: ModelConfig | None, context: Context, sink: EventSink
) -> StageScores:
    if not _is_cached(config):
        return StageScores(config.name, reason=NEEDS_NONE)
    if data.is_pending:
        return StageScores(config.name, reason=MADE_LATER)
    if start is None:
        return StageScores(config.name, reason=WAITS)
    from preftune.modeling.load import load_model
    from preftune.training.devices import choose_precision
    from preftune.training.prepare import fill_cache
    from preftune.training.state import StagePlan
    from preftune.training.stopping import StopRequest

    plan_of_stage = StagePlan(
        config=config,
        loaded=load_model(start, precision=choose_precision(start.dtype, config.adapter)),
        train=data.train,
        select=data.select,
        folder=context.reference_cache,  # nothing is written there but scores
        seed=seed_of(recipe.seed, config.round),
        recipe_digest="",
        cache_folder=context.reference_cache,
        reference=reference_model(recipe, config),
    )
    with StopRequest() as stop:
        scored = fill_cache(plan_of_stage, sink, should_stop=lambda: bool(stop))
    assert scored is not None
    hits, misses = scored.num_held, scored.num_asked - scored.num_held
    return StageScores(config.name, hits, misses, scored.cache.num_bytes, scored.cache.identity.digest)


def _is_cached(config: StageConfig) -> bool:
    from preftune.maths.losses.base import losses

    if config.kind != "train" or not losses.build(config.method, config.loss).needs_reference:
        return False
    return config.reference is None or config.reference.policy == "cached"
