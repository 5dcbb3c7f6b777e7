"""The reference of a stage: the model that it starts from, scored once for each completion and kept by content."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from preftune.core.errors import CheckpointError, Interrupted
from preftune.core.events import EventSink, Progress
from preftune.core.records import TokenisedExample
from preftune.data.pack import Pack, pack_step
from preftune.modeling.adapters import adapter_off
from preftune.modeling.forward import Scorer
from preftune.modeling.reference import ReferenceCache, ReferenceIdentity
from preftune.training.ranks import Ranks
from preftune.training.spread import ONE, Spread
from preftune.training.state import StagePlan

DELAY = 30.0  # seconds that a file of another host may take to show


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores of the reference, from the cache.

    Parameters
        cache: per-token log-probabilities by content. device: where packs are scored.
        is_fresh: every completion of the first pack was scored by this process, in that pack, as it will be trained on.
    """

    cache: ReferenceCache
    device: torch.device
    is_fresh: bool

    @property
    def identity(self) -> str:
        """Digest of weights, precision, kernel and versions: what the scores depend on."""
        return self.cache.identity.digest

    @property
    def num_forwards(self) -> int:
        """Completions that this process scored."""
        return self.cache.num_forwards

    def scores(self, pack: Pack) -> Tensor:
        """Log-probabilities of a pack's scored tokens in the order of ``pack.targets``; (targets,) nats, float32."""
        parts = [part for example in pack.examples for part in self.cache.scores(example)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)


def score_reference(
    stage: StagePlan,
    scorer: Scorer,
    packs: Sequence[Pack],
    sink: EventSink,
    *,
    should_stop: Callable[[], bool],
    spread: Spread = ONE,
    weights: str | None = None,
) -> Reference:
    """Score what the cache does not hold, in the very packs that training and evaluation will see; ranks share the work.

    Parameters
        weights: digest of the reference's weights, where it was taken before they were spread over processes.

    Raises
        Interrupted: ``should_stop`` said so; what was scored is kept.
    """
    ranks = stage.ranks
    identity = ReferenceIdentity.of(scorer, weights)
    cache = ReferenceCache(stage.cache_folder, identity)
    pending: list[Pack] = []
    left: list[TokenisedExample] = []
    for pack, missing in zip(packs, _missing(cache, packs, ranks), strict=True):
        if len(missing) == len(pack.examples):
            pending.append(pack)
        else:
            left.extend(missing)
    # A pair may share a completion with a pair of an earlier run, whose score was rounded in another pack.
    is_fresh = bool(ranks.from_first(bool(packs) and cache.is_new(packs[0])))
    pending += pack_step(left, stage.config.tokens_per_pack)
    turns = list(ranks.turns(pending))
    for done, turn in enumerate(turns):
        if ranks.any(is_so=should_stop()):
            raise Interrupted(
                f"stage {stage.config.name} stopped while the reference was scored, "
                f"{done * ranks.size} of {len(pending)} packs done; "
                "their scores are kept, resume the run to go on"
            )
        with spread.turn(scorer, turn):
            if turn.index is None:
                _idle(scorer, turn.pack)
            else:
                cache.fill(turn.pack, scorer, is_forced=ranks.size > 1)
        sink(Progress("scoring the reference", min((done + 1) * ranks.size, len(pending)), len(pending)))
    if turns and ranks.size > 1:
        ranks.wait()
        _wait_for_others(cache, pending)
    return Reference(cache, scorer.device, is_fresh and (ranks.size == 1 or ranks.launch.is_one_host))


def _missing(cache: ReferenceCache, packs: Sequence[Pack], ranks: Ranks) -> list[list[TokenisedExample]]:
    """What the cache lacks of each pack, as the first rank sees it: other runs may be filling it at this moment."""
    found = [cache.lookup(pack.examples) for pack in packs]
    if ranks.size == 1:
        return found
    ours = [
        [place for place, one in enumerate(pack.examples) if any(one is other for other in missing)]
        for pack, missing in zip(packs, found, strict=True)
    ]
    places = ranks.from_first(ours)
    return [[pack.examples[place] for place in some] for pack, some in zip(packs, places, strict=True)]


def _idle(scorer: Scorer, pack: Pack) -> None:
    """A pass that is kept nowhere."""
    with torch.no_grad(), adapter_off(scorer.model):
        scorer.token_logps(pack)


def _wait_for_others(cache: ReferenceCache, packs: Sequence[Pack]) -> None:
    """See what the other ranks have written; network file systems show it with some delay."""
    deadline = time.monotonic() + DELAY
    while True:
        cache.refresh()
        missing = sum(len(cache.lookup(pack.examples)) for pack in packs)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{cache.folder}: {missing} examples that other ranks scored are not there after {DELAY:.0f} s; "
                "put PREFTUNE_CACHE where all hosts see it"
            )
        time.sleep(0.2)
